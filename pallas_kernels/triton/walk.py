"""The way of one program along K: packed words -> slabs of 16-bit floats -> tensor cores.

A program computes one output tile, `block_n` features by `block_m` tokens. It walks along K, turns
each plane of the packed words into a slab of 32 input features in 16-bit floats and feeds it to the
tensor cores as the *left* operand, so that tokens are the short side:

    out[m, n] = sum_g scale[g, n] * sum_{k in group g} (q[n, k] - zero_point[n]) * x[m, k]

Numerics. q - zero_point is an integer below 2^8 in magnitude, exact in float16 and bfloat16. Sums
are float32, and the scale multiplies a float32 partial sum, so the weight is used unrounded.
Exceptions, where w = (q - zero_point) * scale is rounded once to the dtype of x instead: tiles with
`scale_on="weight"`; groups that end within a slab of 32 features.

Neither masks nor bounds are left to Pallas, since jax <= 0.11.2 reads and writes past the end of an
array.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.format.planes import add_plain, describe_plane, negate_zero
from pallas_kernels.format.spec import SLAB_K, TILE_N, QuantSpec
from pallas_kernels.tiles.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class Strip:
    """`block_n` features of a weight.

    Attributes:
      leaves: references to the leaf dict.
      column: the first feature, a multiple of 64.
      lead: index of the leading axes of each leaf: (expert,) of a stack, () of one weight.
    """

    leaves: Any
    column: jax.Array
    lead: tuple = ()


def divide(number: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of non-negative int32."""
    divisor = jnp.full_like(number, by)
    return lax.div(number, divisor), lax.rem(number, divisor)


@dataclasses.dataclass(frozen=True)
class Walk:
    """The way along K for some rows of x.

    Attributes:
      x_ref: [M, K].
      rows: int32 [block_m], the rows of x, each within M.
      plain: whether to use array operations alone, which also run interpreted.
    """

    x_ref: Any
    rows: jax.Array
    spec: QuantSpec
    tiles: Tiles
    block_n: int
    plain: bool

    @property
    def group_slabs(self) -> int:
        """The largest number of consecutive slabs of 32 features that surely lie in one group."""
        if self.spec.groups == 1:
            return self.tiles.block_k // SLAB_K
        return max(1, math.gcd(self.spec.group_size, self.tiles.block_k) // SLAB_K)

    def sum_along_k(self, strips: Sequence[Strip], split: jax.Array) -> list[jax.Array]:
        """Float32 [block_n, block_m] for each strip: the sum over the part of K of `split`."""
        spec, tiles = self.spec, self.tiles
        steps = pl.cdiv(spec.tiles_k * spec.tile_k, tiles.block_k)
        per_split = pl.cdiv(steps, tiles.splits)
        first = split * per_split
        # Not known at compile time if K is split, or a short loop would be unrolled.
        count = steps if tiles.splits == 1 else jnp.minimum(per_split, steps - first)

        def take_step(i, carry):
            sums, groups = carry
            # One step ahead, since loads this narrow are not part of the copy pipeline.
            ahead = groups if spec.groups == 1 else self.load_groups(strips, first + i + 1)
            return self.add_step(strips, groups, first + i, sums), ahead

        zeros = [jnp.zeros((self.block_n, tiles.block_m), jnp.float32) for _ in strips]
        start = self.load_groups(strips, first)
        sums, groups = lax.fori_loop(0, count, take_step, (zeros, start))
        if spec.groups == 1 and tiles.scale_on == "sum":
            scales = [group[0][0].astype(jnp.float32)[:, None] for group in groups]
            sums = [total * scale for total, scale in zip(sums, scales, strict=True)]
        return sums

    def load_groups(self, strips: Sequence[Strip], step: jax.Array) -> list:
        """For each strip, (scale, zero point if any) [block_n] of each group in one step."""
        if self.spec.is_mixed:
            return []
        return [
            [self.load_group(strip, step, slab) for slab in self.count_slabs()] for strip in strips
        ]

    def count_slabs(self) -> range:
        """The first slab of each run of slabs in one step that share a group."""
        return range(0, self.tiles.block_k // SLAB_K, self.group_slabs)

    def load_group(self, strip: Strip, step: jax.Array, slab: int) -> tuple:
        k = step * self.tiles.block_k + slab * SLAB_K
        # Past the end of K x is 0, and any group serves.
        group = jnp.minimum(divide(k, self.spec.group_size)[0], self.spec.groups - 1)
        return tuple(
            plgpu.load(leaf.at[*strip.lead, group, pl.ds(strip.column, self.block_n)])
            for leaf in _list_grouped(strip)
        )

    def add_step(self, strips, groups, step: jax.Array, sums: list) -> list:
        """Add the products of `block_k` input features to `sums`."""
        spec, tiles = self.spec, self.tiles
        words = [
            [self.load_words(s, step, tile) for tile in range(tiles.block_k // spec.tile_k)]
            for s in strips
        ]
        summed_apart = not self.spec.is_mixed and spec.groups > 1 and tiles.scale_on == "sum"
        for run, first in enumerate(self.count_slabs()):
            parts = [jnp.zeros_like(total) for total in sums] if summed_apart else list(sums)
            for slab in range(first, first + self.group_slabs):
                k = step * tiles.block_k + slab * SLAB_K
                tile, plane = divmod(slab, spec.planes)
                x = self.load_x(k)
                for i, strip in enumerate(strips):
                    if self.spec.is_mixed:
                        scale, *zero = self.load_each(strip, k)
                        w = self.unpack(words[i][tile], zero, plane).astype(jnp.float32)
                        w = (w * scale.astype(jnp.float32)).astype(x.dtype)
                    else:
                        scale, *zero = groups[i][run]
                        w = self.unpack(words[i][tile], zero, plane)
                        w = w * scale[:, None] if tiles.scale_on == "weight" else w
                    parts[i] = parts[i] + plgpu.dot(w, x, trans_b=True)
            if summed_apart:
                scales = [group[run][0].astype(jnp.float32)[:, None] for group in groups]
                rows_of_three = zip(parts, scales, sums, strict=True)
                parts = [self.multiply_add(*three) for three in rows_of_three]
            sums = parts
        return sums

    def load_words(self, strip: Strip, step: jax.Array, tile: int) -> jax.Array:
        """The words [block_n, 32] of one packed tile along K."""
        spec, per_step = self.spec, self.tiles.block_k // self.spec.tile_k
        place = step * per_step + tile
        if spec.tiles_k % per_step:
            place = jnp.minimum(place, spec.tiles_k - 1)
        tiles_n = pl.ds(divide(strip.column, TILE_N)[0], self.block_n // TILE_N)
        words = plgpu.load(strip.leaves["packed"].at[*strip.lead, tiles_n, place])
        return words.reshape(self.block_n, SLAB_K)

    def load_x(self, k: jax.Array) -> jax.Array:
        """x [block_m, 32] from input feature k on, 0 past the end of K."""
        columns = k + jnp.arange(SLAB_K, dtype=jnp.int32)
        at = self.x_ref.at[self.rows[:, None], columns[None, :]]
        if self.spec.in_features % self.tiles.block_k == 0:
            return plgpu.load(at)
        return plgpu.load(at, mask=(columns < self.spec.in_features)[None, :], other=0)

    def unpack(self, words: jax.Array, zero: Sequence[jax.Array], number: int) -> jax.Array:
        """q - zero_point of one plane [block_n, 32], exact in the dtype of x."""
        dtype = self.x_ref.dtype
        plane = describe_plane(self.spec.bits, number, dtype)
        # Converted before the broadcast: otherwise Triton converts it for each weight.
        addend = negate_zero(zero[0] if zero else None, plane)
        addend = addend[:, None] if addend.ndim == 1 else addend
        addend = jnp.broadcast_to(addend, words.shape)
        if self.plain:
            return add_plain(words, addend, plane)
        [w] = plgpu.elementwise_inline_asm(
            plane.asm,
            args=[words, addend],
            constraints="=r,r,r",
            pack=2,
            result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, dtype)],
        )
        return w

    def load_each(self, strip: Strip, k: jax.Array) -> tuple:
        """(scale, zero point if any) of each of 32 input features, [block_n, 32]."""
        features = k + jnp.arange(SLAB_K, dtype=jnp.int32)
        groups = divide(features, self.spec.group_size)[0][None, :]
        columns = (strip.column + jnp.arange(self.block_n, dtype=jnp.int32))[:, None]
        mask = groups < self.spec.groups
        return tuple(
            plgpu.load(leaf.at[*strip.lead, groups, columns], mask=mask, other=0)
            for leaf in _list_grouped(strip)
        )

    def multiply_add(self, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        """a * b + c in float32: one instruction, which XLA would not make by itself."""
        b = jnp.broadcast_to(b, a.shape)
        if self.plain:
            return a * b + c
        [out] = plgpu.elementwise_inline_asm(
            "fma.rn.f32 $0, $1, $2, $3;",
            args=[a, b, c],
            constraints="=f,f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, a.dtype)],
        )
        return out


def _list_grouped(strip: Strip) -> list:
    """What a strip has one of for each group: scales, and zero points if any."""
    return [strip.leaves[name] for name in ("scale", "zero_point") if name in strip.leaves]
