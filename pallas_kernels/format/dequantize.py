"""Packed weight -> float weight, rounded exactly as compressed-tensors rounds it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.format.layout import codes_from_tiles
from pallas_kernels.format.spec import SLAB_K, TILE_N, QuantSpec
from pallas_kernels.format.weights import check_weights


def expand(weights: Mapping[str, jax.Array], spec: QuantSpec) -> jax.Array:
    """Compute W = (q - zero_point) * scale as float32 [N, K], rounded to the scale's dtype."""
    q = codes_from_tiles(weights["packed"], spec).astype(jnp.int32) - spec.offset
    if not spec.symmetric:
        q = q - _per_element(weights["zero_point"], spec).astype(jnp.int32)
    return _multiply_rounded(q, _per_element(weights["scale"], spec))


def has_whole_slabs(spec: QuantSpec) -> bool:
    """Whether each slab of 32 input features lies in one group, as `expand_slabs` needs."""
    return spec.group_size % SLAB_K == 0 or spec.groups == 1


def expand_slabs(
    weights: Mapping[str, jax.Array], spec: QuantSpec
) -> Iterator[tuple[slice, jax.Array]]:
    """Compute W as `expand` does, but in the order of the tiles.

    The results have the axes of the packed words, so XLA's loops run over contiguous words and
    vectorise. On a CPU this is about 3 times as fast as `expand`. If the last tile is not full, it
    is a part of its own, since padding inside the loop would prevent that.

    Yields:
      The slabs covered (of 32 input features each) and their weights, float32
      [tiles, planes, padded N, 32]. Features past K hold finite numbers.
    """
    slabs = -(-spec.in_features // SLAB_K)
    full, rest = divmod(slabs, spec.planes)
    for first, tiles, planes in ((0, full, spec.planes), (full, 1, rest)):
        if tiles * planes:
            start = first * spec.planes
            covered = slice(start, start + tiles * planes)
            yield covered, _expand_tiles(weights, spec, slice(first, first + tiles), covered)


def _expand_tiles(
    weights: Mapping[str, jax.Array], spec: QuantSpec, tiles: slice, slabs: slice
) -> jax.Array:
    rows, count = spec.tiles_n * TILE_N, tiles.stop - tiles.start
    planes = (slabs.stop - slabs.start) // count
    per_group = max(1, spec.group_size // SLAB_K)

    def per_slab(grouped: jax.Array) -> jax.Array:
        repeats = slabs.stop if spec.groups == 1 else per_group
        wide = jnp.broadcast_to(grouped[:, None, :], (spec.groups, repeats, rows))
        return wide.reshape(-1, rows)[slabs].reshape(count, planes, rows, 1)

    words = weights["packed"][:, tiles].transpose(1, 0, 2, 3).reshape(count, 1, rows, SLAB_K)
    shifts = jnp.arange(planes, dtype=jnp.int32).reshape(1, planes, 1, 1) * spec.bits
    codes = (words.astype(jnp.int32) >> shifts) & ((1 << spec.bits) - 1)
    if spec.symmetric:
        q = codes - spec.offset
    else:
        q = codes - (per_slab(weights["zero_point"]).astype(jnp.int32) + spec.offset)
    return _multiply_rounded(q, per_slab(weights["scale"]))


def _multiply_rounded(q: jax.Array, scale: jax.Array) -> jax.Array:
    """q * scale, rounded to the scale's dtype, as float32.

    compressed-tensors (`quantization/lifecycle/forward_helpers.py`, `_dequantize`) computes in the
    scale's dtype. q - zero_point has at most 9 bits, so it is exact there and only the product
    rounds; here the product is exact in float32 and rounded once to the same value. For bfloat16
    that is written out in integers (round to nearest even), since XLA may skip a float32 ->
    bfloat16 -> float32 round trip, and its `reduce_precision` is slower. A NaN stays NaN, since the
    payload of a bfloat16 leaves the lower half free. For float16 XLA keeps the round trip, which
    handles subnormals.
    """
    if scale.dtype == jnp.float16:
        return (q.astype(jnp.float16) * scale).astype(jnp.float32)
    exact = q.astype(jnp.float32) * scale.astype(jnp.float32)
    if scale.dtype != jnp.bfloat16:
        return exact
    return _round_to_bfloat16(exact)


@jax.custom_jvp
def _round_to_bfloat16(x: jax.Array) -> jax.Array:
    """Round float32 to the nearest bfloat16, ties to even, as float32; its derivative is 1."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    rounded = bits + jnp.uint32(0x7FFF) + ((bits >> 16) & jnp.uint32(1))
    return lax.bitcast_convert_type(rounded & jnp.uint32(0xFFFF0000), jnp.float32)


_round_to_bfloat16.defjvps(lambda tangent, rounded, x: tangent)


def _per_element(grouped: jax.Array, spec: QuantSpec) -> jax.Array:
    """[G, padded N] -> [N, K], each column repeated over its group."""
    rows = grouped[:, : spec.out_features].T[:, :, None]
    wide = jnp.broadcast_to(rows, (spec.out_features, spec.groups, spec.group_size))
    return wide.reshape(spec.out_features, spec.in_features)


def dequantize(weights: Mapping[str, jax.Array], spec: QuantSpec, dtype=None) -> jax.Array:
    """Expand a packed weight to floats.

    Args:
      weights: leaf dict of one weight (see `pallas_kernels.format.weights`), or of stacked experts.
      spec: the spec of one weight.
      dtype: dtype of the result; None means the scale's dtype. In that dtype the result equals
        compressed-tensors' `decompress` bit for bit (float32 results below 2^-126 are flushed to
        zero, as XLA does on CPU).

    Returns:
      [N, K], for experts [E, N, K], computed in the scale's dtype and then cast to `dtype`. Columns
      are in the original order of the input features, with "perm" too.

    Raises:
      SpecError: if the arrays contradict the spec.

    Example:
      ```python
      spec = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=False, in_features=64, out_features=128
      )
      w = jax.random.normal(jax.random.key(0), (128, 64))
      packed = jaxwna16.quantize(w, spec)
      rounded = jaxwna16.dequantize(packed, spec, jnp.float32)
      assert abs(rounded - w).max() < 0.3
      ```
    """
    shape = getattr(weights.get("packed"), "shape", ()) if isinstance(weights, Mapping) else ()
    experts = shape[0] if len(shape) == 5 else None
    check_weights(weights, spec, experts)
    run = _dequantize if experts is None else jax.vmap(_dequantize, in_axes=(0, None))
    scale_dtype = weights["scale"].dtype
    return run(dict(weights), spec).astype(scale_dtype if dtype is None else dtype)


@functools.partial(jax.jit, static_argnames="spec")
def _dequantize(weights: dict[str, jax.Array], spec: QuantSpec) -> jax.Array:
    expanded = expand(weights, spec).astype(weights["scale"].dtype)
    if "perm" not in weights:
        return expanded
    return jnp.zeros_like(expanded).at[:, weights["perm"]].set(expanded, unique_indices=True)
