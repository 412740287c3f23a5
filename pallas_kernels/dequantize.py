"""Packed weight -> float weight, rounded exactly as compressed-tensors rounds it."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.layout import codes_from_tiles
from pallas_kernels.spec import QuantSpec
from pallas_kernels.weights import check_weights


def expand(weights: Mapping[str, jax.Array], spec: QuantSpec) -> jax.Array:
    """Compute (q - zero_point) * scale, rounded to the scale's dtype, as float32 [N, K].

    compressed-tensors (`quantization/lifecycle/forward.py`, `_dequantize`) subtracts and multiplies
    in the scale's dtype. The difference has at most 9 bits, so it is exact in float16 and bfloat16
    and only the product rounds; here the product is exact in float32 and rounded once to the same
    value. For bfloat16 that takes `reduce_precision`, since XLA may skip a float32 -> bfloat16 ->
    float32 round trip ("excess precision"); for float16 it takes a native product, since
    `reduce_precision` flushes float16 subnormals.
    """
    scale = weights["scale"]
    q = codes_from_tiles(weights["packed"], spec).astype(jnp.int32) - spec.offset
    if not spec.symmetric:
        q = q - _per_element(weights["zero_point"], spec).astype(jnp.int32)
    if scale.dtype == jnp.float16:
        return (q.astype(jnp.float16) * _per_element(scale, spec)).astype(jnp.float32)
    exact = q.astype(jnp.float32) * _per_element(scale.astype(jnp.float32), spec)
    return lax.reduce_precision(exact, 8, 7) if scale.dtype == jnp.bfloat16 else exact


def _per_element(grouped: jax.Array, spec: QuantSpec) -> jax.Array:
    """[G, padded N] -> [N, K], each column repeated over its group."""
    rows = grouped[:, : spec.out_features].T[:, :, None]
    wide = jnp.broadcast_to(rows, (spec.out_features, spec.groups, spec.group_size))
    return wide.reshape(spec.out_features, spec.in_features)


def dequantize(weights: Mapping[str, jax.Array], spec: QuantSpec, dtype=None) -> jax.Array:
    """Expand a packed weight to floats.

    Args:
      weights: leaf dict of one weight (see `pallas_kernels.weights.check_weights`).
      spec: its static facts.
      dtype: dtype of the result; None is the scale's dtype, in which the result equals
        compressed-tensors' `decompress` bit for bit (float32 results below 2^-126 are flushed to
        zero, as XLA does on CPU).

    Returns:
      [N, K], computed in the scale's dtype and then cast to `dtype`.

    Raises:
      SpecError: if the arrays contradict the spec.
    """
    check_weights(weights, spec)
    scale_dtype = weights["scale"].dtype
    return _dequantize(dict(weights), spec).astype(scale_dtype if dtype is None else dtype)


@functools.partial(jax.jit, static_argnames="spec")
def _dequantize(weights: dict[str, jax.Array], spec: QuantSpec) -> jax.Array:
    return expand(weights, spec).astype(weights["scale"].dtype)
