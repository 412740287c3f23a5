"""The XLA path: expand one weight inside the call, then one dot. Runs wherever JAX runs."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dequantize import expand, expand_slabs, has_whole_slabs
from pallas_kernels.spec import SLAB_K, QuantSpec


def matmul(x: jax.Array, weights: Mapping[str, jax.Array], spec: QuantSpec) -> jax.Array:
    """Compute x @ W.T for x [M, K] -> [M, N] in x's dtype, accumulated in float32.

    W is rounded to the scale's dtype as compressed-tensors does, then to x's dtype. The barrier ties
    the weight to x: without it XLA lifts the expansion out of a decode loop, and every float weight
    of the model would live as long as the loop.
    """
    x, packed = lax.optimization_barrier((x, dict(weights)))
    multiply = _multiply_slabs if x.shape[0] == 1 and has_whole_slabs(spec) else _multiply
    return multiply(x, packed, spec).astype(x.dtype)


def _multiply(x: jax.Array, weights: dict[str, jax.Array], spec: QuantSpec) -> jax.Array:
    return _dot(x, expand(weights, spec), ((1,), (1,)), ((), ()))


def _multiply_slabs(x: jax.Array, weights: dict[str, jax.Array], spec: QuantSpec) -> jax.Array:
    """One small product for each 32 input features, then their sum.

    For a single row of x the cost is the expansion, and slabs expand fastest; from a few rows on the
    many small products cost more than that saves.
    """
    rows, width = x.shape[0], spec.tiles_k * spec.tile_k
    padded = jnp.pad(x, ((0, 0), (0, width - spec.in_features)))
    slabs = padded.reshape(rows, spec.tiles_k, spec.planes, SLAB_K).transpose(1, 2, 0, 3)
    products = _dot(slabs, expand_slabs(weights, spec), ((3,), (3,)), ((0, 1), (0, 1)))
    return products.sum(axis=(0, 1))[:, : spec.out_features]


def _dot(x: jax.Array, w: jax.Array, contract, batch) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        w.astype(x.dtype),
        (contract, batch),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
