"""The XLA path: expand one weight inside the call, then one dot. Runs wherever JAX runs."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.format.dequantize import expand, expand_slabs, has_whole_slabs
from pallas_kernels.format.spec import SLAB_K, QuantSpec


def matmul(x: jax.Array, weights: Mapping[str, jax.Array], spec: QuantSpec) -> jax.Array:
    """Compute x @ W.T + bias for x [M, K] -> float32 [M, N].

    W is rounded to the scale's dtype as compressed-tensors does, then to x's dtype. With "perm" the
    features of x are reordered first.
    """
    if "perm" in weights:
        # The barrier keeps the product from reading x the other way round. jax 0.10 cannot run such
        # a product in bfloat16 on a CPU that has instructions for it.
        x = lax.optimization_barrier(jnp.take(x, weights["perm"], axis=1))
    tied = _tie({name: leaf for name, leaf in weights.items() if name not in ("bias", "perm")}, x)
    multiply = _multiply_slabs if x.shape[0] == 1 and has_whole_slabs(spec) else _multiply
    y = multiply(x, tied, spec)
    return y + weights["bias"].astype(y.dtype)[None, :] if "bias" in weights else y


def _tie(weights: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
    """`weights` with the same values, made to depend on x.

    Otherwise XLA would expand every weight of a model at the start of a step, or once before a
    decode loop, and hold all of them as floats. An `optimization_barrier` does not help: XLA
    removes it before instructions are ordered.
    """
    zero = _find_zero(lax.stop_gradient(x))
    return {name: leaf + zero.astype(leaf.dtype) for name, leaf in weights.items()}


@jax.custom_batching.custom_vmap
def _find_zero(x: jax.Array) -> jax.Array:
    """int32 0, computed from x in a way that XLA does not see through.

    The reduction is an instruction by itself. Without it, XLA fuses everything that computes x into
    the expansion. Under `vmap` there is one zero for all rows, so that they share one expansion.
    """
    words = lax.bitcast_convert_type(x[..., :1, :8].astype(jnp.float32), jnp.int32)
    return jnp.minimum(jnp.min(words & 1), 0)


@_find_zero.def_vmap
def _find_one_zero(axis_size: int, in_batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return _find_zero(x), False


def _multiply(x: jax.Array, weights: dict[str, jax.Array], spec: QuantSpec) -> jax.Array:
    return _dot(x, expand(weights, spec), ((1,), (1,)), ((), ()))


def _multiply_slabs(x: jax.Array, weights: dict[str, jax.Array], spec: QuantSpec) -> jax.Array:
    """One small product for each 32 input features, then their sum.

    For a single row of x the cost is the expansion, and slabs expand fastest. From a few rows on,
    the many small products cost more than that saves.
    """
    slabs = -(-spec.in_features // SLAB_K)
    padded = jnp.pad(x, ((0, 0), (0, slabs * SLAB_K - spec.in_features)))
    by_slab = padded.reshape(x.shape[0], slabs, SLAB_K).transpose(1, 0, 2)
    total = jnp.float32(0)
    for covered, w in expand_slabs(weights, spec):
        part = by_slab[covered].reshape(*w.shape[:2], x.shape[0], SLAB_K)
        products = _dot(part, w, ((3,), (3,)), ((0, 1), (0, 1)))
        total = total + products.sum(axis=(0, 1))[:, : spec.out_features]
    return total


def _dot(x: jax.Array, w: jax.Array, contract, batch) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        w.astype(x.dtype),
        (contract, batch),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
