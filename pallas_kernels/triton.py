"""The fused GPU kernel: multiply by a packed weight that is never expanded in memory.

One program computes one output tile of 64 features and 8 to 64 tokens. It walks along K one packed
tile at a time, turns each plane of the tile's words into a 64 x 32 slab of 16-bit floats and feeds
it to the tensor cores as the *left* operand, so that tokens are the short side of the product:

    out[m, n] = sum_g scale[g, n] * sum_{k in group g} (q[n, k] - zero[g, n]) * x[m, k]

Numerics. q - zero is an integer below 2^8 in magnitude, exact in float16 and bfloat16. Sums are
float32, and the scale multiplies a float32 partial sum, so the weight is used without any rounding.
(`dequantize` differs: it rounds the weight to the scale's dtype, as compressed-tensors does.)
One exception: where a slab of 32 features can meet two groups (several groups, of a size that is no
multiple of 32), no partial sum belongs to a single scale. There (q - zero) * scale is formed for
each weight in float32 and rounded once to the dtype of x, in whose range it must lie.

This file alone imports Pallas-Triton, which jax >= 0.11 calls deprecated: it warns when the kernel
is lowered for a GPU.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.errors import BackendError
from pallas_kernels.spec import SLAB_K, TILE_N, QuantSpec

_ACTIVATIONS = (jnp.bfloat16, jnp.float16)
_MIN_BLOCK_M, _MAX_BLOCK_M = 8, 64


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    spec: QuantSpec,
    *,
    interpret: bool,
) -> jax.Array:
    """Compute x @ W.T for a packed weight W[N, K]; the module's docstring states the rounding.

    Args:
      x: [M, K] bfloat16 or float16, M >= 1.
      packed: uint16 `spec.packed_shape`.
      scale: float16, bfloat16 or float32 `spec.scale_shape`.
      zero_point: int8 `spec.scale_shape`; None if and only if `spec.symmetric`.
      spec: the static facts of W.
      interpret: run as ordinary XLA operations, slowly but on any device, instead of on a GPU.

    Returns:
      [M, N] in the dtype of x.

    Raises:
      BackendError: if x is not bfloat16 or float16, or has no rows.
    """
    if x.dtype not in _ACTIVATIONS or x.shape[0] < 1:
        raise BackendError(
            "the Triton kernel takes x [M >= 1, K] in bfloat16 or float16, "
            f"got {x.dtype.name} {list(x.shape)}"
        )
    tokens = x.shape[0]
    block_m = min(max(pl.next_power_of_2(tokens), _MIN_BLOCK_M), _MAX_BLOCK_M)
    zeros = () if zero_point is None else (zero_point,)
    # Token tiles run fastest, so programs that share a weight tile meet in the L2 cache. The third
    # grid dimension is left to vmap; y and z must stay within 65535.
    return pl.pallas_call(
        functools.partial(_multiply_tile, spec=spec, block_m=block_m),
        out_shape=jax.ShapeDtypeStruct((tokens, spec.out_features), x.dtype),
        grid=(pl.cdiv(tokens, block_m), spec.tiles_n),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(x, packed, scale, *zeros)


def _multiply_tile(x_ref, packed_ref, scale_ref, *refs, spec: QuantSpec, block_m: int) -> None:
    """Compute one [block_m, TILE_N] tile of out; `refs` are zero_point (if any) and out."""
    *zero_ref, out_ref = refs
    tile_n = pl.program_id(1)
    row, column = pl.program_id(0) * block_m, tile_n * TILE_N
    rows = row + jnp.arange(block_m, dtype=jnp.int32)
    columns = column + jnp.arange(TILE_N, dtype=jnp.int32)
    is_token = (rows < x_ref.shape[0])[:, None]
    mixed = spec.groups > 1 and spec.group_size % SLAB_K != 0

    def load_x(k):
        # By hand, since jax <= 0.11.2 reads on past the end of an array.
        mask = is_token & (k + jnp.arange(SLAB_K, dtype=jnp.int32) < spec.in_features)[None, :]
        slab = x_ref.at[pl.ds(row, block_m), pl.ds(k, SLAB_K)]
        return plgpu.load(slab, mask=mask, other=0)

    def load_group(ref, k):
        """Values of the group of feature k, [64, 1]; if mixed, of each of 32 features, [64, 32]."""
        if not mixed:
            # The last tile may pass the end of K, where x is 0 and any group serves.
            group = jnp.minimum(k // spec.group_size, spec.groups - 1)
            return plgpu.load(ref.at[group, pl.ds(column, TILE_N)])[:, None]
        groups = ((k + jnp.arange(SLAB_K, dtype=jnp.int32)) // spec.group_size)[None, :]
        return plgpu.load(ref.at[groups, columns[:, None]], mask=groups < spec.groups, other=0)

    def add_tile(tile_k, acc):
        words = plgpu.load(packed_ref.at[tile_n, tile_k])
        run = _count_planes_per_scale(spec)
        for first in range(0, spec.planes, run):
            k = tile_k * spec.tile_k + first * SLAB_K
            scale = load_group(scale_ref, k).astype(jnp.float32)
            zero = load_group(zero_ref[0], k) if zero_ref else jnp.zeros((TILE_N, 1), jnp.int8)
            partial = jnp.zeros((TILE_N, block_m), jnp.float32)
            for plane in range(first, first + run):
                weight = _subtract_zero(words, plane, zero, spec, x_ref.dtype)
                if mixed:
                    weight = (weight.astype(jnp.float32) * scale).astype(x_ref.dtype)
                x = load_x(k + (plane - first) * SLAB_K)
                partial += plgpu.dot(weight, x, trans_b=True)
            acc += partial if mixed else partial * scale
        return acc

    acc = jnp.zeros((TILE_N, block_m), jnp.float32)
    acc = lax.fori_loop(0, spec.tiles_k, add_tile, acc)
    tile = out_ref.at[pl.ds(row, block_m), pl.ds(column, TILE_N)]
    is_output = is_token & (columns < spec.out_features)[None, :]
    plgpu.store(tile, acc.T.astype(out_ref.dtype), mask=is_output)


def _count_planes_per_scale(spec: QuantSpec) -> int:
    """How many consecutive planes of a tile surely lie in one group (1 if not even one does)."""
    if spec.groups == 1:
        return spec.planes
    return max(1, math.gcd(spec.group_size, spec.tile_k) // SLAB_K)


def _subtract_zero(words, plane: int, zero, spec: QuantSpec, dtype):
    """Compute q - zero, exact in `dtype`, of one plane of words uint16 [64, 32].

    There is no conversion: a field written into the lowest bits of the significand of a power of
    two is that power plus the field (0x4300 is 128 in bfloat16, 0x6400 is 1024 in float16, both
    with a unit of 1 in the last place), and one subtraction takes the power away again.
    """
    magic, power = (0x4300, 128) if dtype == jnp.bfloat16 else (0x6400, 1024)

    def add_power(field):
        return lax.bitcast_convert_type(field | magic, dtype)

    zero = zero.astype(jnp.float32)
    field = (words >> (plane * spec.bits)) & ((1 << spec.bits) - 1)
    if spec.bits == 8 and dtype == jnp.bfloat16:
        # Only 7 bits fit below bfloat16's power: bit 7 falls into the exponent and makes 256 of
        # 128. As q = u - 128, flipping that bit makes it the sign bit, worth -128.
        field = field ^ 0x80
        return add_power(field & 0x7F) - add_power(field & 0x80) - zero.astype(dtype)
    return add_power(field) - (zero + (power + spec.offset)).astype(dtype)
