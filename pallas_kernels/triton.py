"""The GPU kernels: multiply by packed weights without expanding them in memory, or expand one.

A program of the fused kernel computes one output tile, `block_n` features by `block_m` tokens. It
walks along K, turns each plane of the packed words into a slab of 32 input features in 16-bit
floats and feeds it to the tensor cores as the *left* operand, so that tokens are the short side:

    out[m, n] = sum_g scale[g, n] * sum_{k in group g} (q[n, k] - zero_point[n]) * x[m, k]

Numerics. q - zero_point is an integer below 2^8 in magnitude, exact in float16 and bfloat16. Sums
are float32, and the scale multiplies a float32 partial sum, so the weight is used unrounded.
Exceptions, where w = (q - zero_point) * scale is rounded once to the dtype of x instead: tiles with
`scale_on="weight"`; groups that end within a slab of 32 features; `expand`.

Programs are numbered along one axis, so `vmap` over stacked weights has two axes of the grid left.
Neither masks nor bounds are left to Pallas, since jax <= 0.11.2 reads and writes past the end of an
array. A tile that would pass the end of N starts earlier instead and computes some features twice,
and tokens past the end repeat the last one.

This file alone imports Pallas-Triton, which jax >= 0.11 calls deprecated (at lowering).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.device import Device, find_device
from pallas_kernels.errors import BackendError
from pallas_kernels.schedule import Tiles, find_faults, measure_shared_memory
from pallas_kernels.spec import SLAB_K, TILE_N, QuantSpec
from pallas_kernels.unpack import add_plain, describe_plane, negate_zero

_ACTIVATIONS = (jnp.bfloat16, jnp.float16)
Weights = Mapping[str, jax.Array]


def multiply(
    x: jax.Array,
    weights: Sequence[Weights],
    specs: Sequence[QuantSpec],
    tiles: Tiles,
    *,
    gated: bool = False,
    interpret: bool = False,
) -> list[jax.Array]:
    """Compute x @ W.T + bias for weights that share x, in one kernel.

    Args:
      x: [M, K] bfloat16 or float16, M >= 1.
      weights: leaf dicts (`pallas_kernels.weights`), without "perm".
      specs: their specs, equal in all but `out_features`.
      tiles: how the work is divided.
      gated: take two weights of equal size as gate and up: the result is silu(gate) * up.
      interpret: run as ordinary XLA operations, slowly but on any device, instead of on a GPU.

    Returns:
      [M, N] for each weight, in the dtype of x; one array if gated.

    Raises:
      BackendError: if x is not bfloat16 or float16 or has no rows, or the tiles do not fit.
    """
    if x.dtype not in _ACTIVATIONS or x.shape[0] < 1:
        raise BackendError(
            "the Triton kernel takes x [M >= 1, K] in bfloat16 or float16, "
            f"got {x.dtype.name} {list(x.shape)}"
        )
    if faults := find_faults(tiles, specs[0]):
        raise BackendError(f"{tiles} does not fit {specs[0]}: " + "; ".join(faults))
    scale_dtypes = {w["scale"].dtype.name for w in weights}
    if tiles.scale_on == "weight" and scale_dtypes != {x.dtype.name}:
        raise BackendError(
            f"scale_on='weight' needs scales of the dtype of x, {x.dtype.name}, "
            f"got {', '.join(sorted(scale_dtypes))}"
        )
    split = tiles.splits > 1
    # a bias joins the sum over the splits; an activation needs that sum
    inputs = [{n: a for n, a in w.items() if n != "bias"} if split else dict(w) for w in weights]
    paired = gated and not split and can_pair(specs[0], tiles, find_device())
    jobs = [tuple(range(len(specs)))] if paired else [(i,) for i in range(len(specs))]
    lead = (tiles.splits,) if split else ()
    dtype = jnp.float32 if split else x.dtype
    outputs = [
        jax.ShapeDtypeStruct((*lead, x.shape[0], specs[job[0]].out_features), dtype) for job in jobs
    ]
    blocks = [_choose_block_n(specs[job[0]], tiles) for job in jobs]
    widths = [
        pl.cdiv(specs[job[0]].tiles_n * TILE_N, block)
        for job, block in zip(jobs, blocks, strict=True)
    ]
    out = pl.pallas_call(
        functools.partial(
            _multiply_tile,
            jobs=jobs,
            blocks=blocks,
            widths=widths,
            specs=specs,
            tiles=tiles,
            plain=interpret,
        ),
        out_shape=outputs,
        grid=(pl.cdiv(x.shape[0], tiles.block_m) * sum(widths) * tiles.splits,),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
    )(x, inputs)
    if paired or not (gated or split):
        return list(out)
    if split:
        sums = [_add_splits(part, w.get("bias")) for part, w in zip(out, weights, strict=True)]
    else:
        sums = [y.astype(jnp.float32) for y in out]
    if gated:
        sums = [jax.nn.silu(sums[0]) * sums[1]]
    return [y.astype(x.dtype) for y in sums]


def can_pair(spec: QuantSpec, tiles: Tiles, device: Device) -> bool:
    """Whether one program can hold the words and, in registers, the sums of gate and up."""
    most = 32 if spec.groups == 1 or spec.group_size >= 128 else 8
    crowded = spec.bits == 8 and spec.groups > 1 and tiles.warps == 2
    pair = dataclasses.replace(tiles, block_n=2 * tiles.block_n)
    fits = measure_shared_memory(pair, spec) <= device.shared_memory
    return tiles.block_m <= most and not crowded and fits


def _choose_block_n(spec: QuantSpec, tiles: Tiles) -> int:
    """Features of one program, at most those there are."""
    padded = spec.tiles_n * TILE_N
    return min(tiles.block_n, 1 << (padded.bit_length() - 1))


def _add_splits(parts: jax.Array, bias: jax.Array | None) -> jax.Array:
    """[splits, M, N] -> [M, N], added in order, so that equal inputs give equal bits."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total if bias is None else total + bias.astype(jnp.float32)[None, :]


def _multiply_tile(
    x_ref, weights, *out_refs, jobs, blocks, widths, specs, tiles: Tiles, plain: bool
) -> None:
    """Compute one tile of one output.

    Token tiles run fastest, so that programs which share a tile of the weight meet in the cache;
    then features, then splits.
    """
    program = pl.program_id(0)
    rest, token_tile = _divide(program, pl.cdiv(x_ref.shape[0], tiles.block_m))
    split, place = _divide(rest, sum(widths))
    first = 0
    for job, block, width, out_ref in zip(jobs, blocks, widths, out_refs, strict=True):
        spec = specs[job[0]]
        # the last tile may start earlier, within the padded rows
        column = jnp.minimum((place - first) * block, spec.tiles_n * TILE_N - block)
        walk = _Walk(x_ref, spec, tiles, token_tile * tiles.block_m, column, block, plain)
        run = functools.partial(_finish_tile, walk, [weights[i] for i in job], out_ref, split)
        if len(jobs) == 1:
            run()
        else:
            pl.when((place >= first) & (place < first + width))(run)
        first += width


def _divide(number: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of non-negative int32."""
    divisor = jnp.full_like(number, by)
    return lax.div(number, divisor), lax.rem(number, divisor)


def _finish_tile(walk: _Walk, weights, out_ref, split: jax.Array) -> None:
    """Walk along K, then bias, activation and store."""
    spec, tiles = walk.spec, walk.tiles
    columns = walk.column + jnp.arange(walk.block_n, dtype=jnp.int32)
    sums = walk.sum_along_k(weights, split)
    for i, weight in enumerate(weights):
        if "bias" in weight:
            bias = plgpu.load(weight["bias"].at[columns], mask=columns < spec.out_features, other=0)
            sums[i] = sums[i] + bias.astype(jnp.float32)[:, None]
    y = sums[0] if len(sums) == 1 else sums[0] * jax.nn.sigmoid(sums[0]) * sums[1]
    rows = walk.token + jnp.arange(tiles.block_m, dtype=jnp.int32)
    mask = (rows < walk.x_ref.shape[0])[:, None] & (columns < spec.out_features)[None, :]
    lead = (split,) if tiles.splits > 1 else ()
    tile = out_ref.at[*lead, pl.ds(walk.token, tiles.block_m), pl.ds(walk.column, walk.block_n)]
    plgpu.store(tile, y.T.astype(out_ref.dtype), mask=mask)


def expand(weights: Weights, spec: QuantSpec, dtype, *, interpret: bool = False) -> jax.Array:
    """Compute W = (q - zero_point) * scale in one pass over memory.

    The result is [N, K] in `dtype`, bfloat16 or float16: the product in float32, rounded once.
    """
    leaves = {name: weights[name] for name in ("packed", "scale", "zero_point") if name in weights}
    return pl.pallas_call(
        functools.partial(_expand_tile, spec=spec, plain=interpret),
        out_shape=jax.ShapeDtypeStruct((spec.out_features, spec.in_features), dtype),
        grid=(spec.tiles_n * spec.tiles_k,),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(leaves)


def _expand_tile(weights, out_ref, *, spec: QuantSpec, plain: bool) -> None:
    """Expand one packed tile: 64 features by `tile_k` input features."""
    tile_n, tile_k = _divide(pl.program_id(0), spec.tiles_k)
    tiles = Tiles(block_m=8, block_n=TILE_N, block_k=spec.tile_k)
    walk = _Walk(out_ref, spec, tiles, jnp.int32(0), tile_n * TILE_N, TILE_N, plain)
    words = walk.load_words(weights, tile_k, 0)
    rows = walk.column + jnp.arange(TILE_N, dtype=jnp.int32)[:, None]
    for plane in range(spec.planes):
        k = tile_k * spec.tile_k + plane * SLAB_K
        if walk.is_mixed:
            scale, *zero = walk.load_each(weights, k)
        else:
            scale, *zero = walk.load_group(weights, tile_k, plane)
            scale = scale[:, None]
        w = walk.unpack(words, zero, plane).astype(jnp.float32) * scale.astype(jnp.float32)
        columns = k + jnp.arange(SLAB_K, dtype=jnp.int32)[None, :]
        mask = (rows < spec.out_features) & (columns < spec.in_features)
        plgpu.store(out_ref.at[rows, columns], w.astype(out_ref.dtype), mask=mask)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The way of one program along K, for features `column` .. and tokens `token` .. ."""

    x_ref: Any
    spec: QuantSpec
    tiles: Tiles
    token: jax.Array
    column: jax.Array
    block_n: int
    plain: bool

    @property
    def group_slabs(self) -> int:
        """How many consecutive slabs of 32 input features surely lie in one group, at most."""
        if self.spec.groups == 1:
            return self.tiles.block_k // SLAB_K
        return max(1, math.gcd(self.spec.group_size, self.tiles.block_k) // SLAB_K)

    @property
    def is_mixed(self) -> bool:
        """Whether a slab may meet two groups, so that no sum belongs to one scale."""
        return self.spec.groups > 1 and self.spec.group_size % SLAB_K != 0

    def sum_along_k(self, weights: Sequence[Any], split: jax.Array) -> list[jax.Array]:
        """Float32 [block_n, block_m] for each weight: the sum over the part of K of `split`."""
        spec, tiles = self.spec, self.tiles
        steps = pl.cdiv(spec.tiles_k * spec.tile_k, tiles.block_k)
        per_split = pl.cdiv(steps, tiles.splits)
        first = split * per_split
        # Not known at compile time if K is split, or a short loop would be unrolled.
        count = steps if tiles.splits == 1 else jnp.minimum(per_split, steps - first)
        rows = self.token + jnp.arange(tiles.block_m, dtype=jnp.int32)
        rows = jnp.minimum(rows, self.x_ref.shape[0] - 1)

        def take_step(i, carry):
            sums, groups = carry
            # One step ahead, since loads this narrow are not part of the copy pipeline.
            ahead = groups if spec.groups == 1 else self.load_groups(weights, first + i + 1)
            return self.add_step(weights, groups, first + i, rows, sums), ahead

        zeros = [jnp.zeros((self.block_n, tiles.block_m), jnp.float32) for _ in weights]
        start = self.load_groups(weights, first)
        sums, groups = lax.fori_loop(0, count, take_step, (zeros, start))
        if spec.groups == 1 and tiles.scale_on == "sum":
            scales = [group[0][0].astype(jnp.float32)[:, None] for group in groups]
            sums = [total * scale for total, scale in zip(sums, scales, strict=True)]
        return sums

    def load_groups(self, weights: Sequence[Any], step: jax.Array) -> list:
        """For each weight, (scale, zero point or None) [block_n] of each group in one step."""
        if self.is_mixed:
            return []
        return [
            [self.load_group(weight, step, slab) for slab in self.count_slabs()]
            for weight in weights
        ]

    def count_slabs(self) -> range:
        """The first slab of each run of slabs in one step that share a group."""
        return range(0, self.tiles.block_k // SLAB_K, self.group_slabs)

    def load_group(self, weight: Any, step: jax.Array, slab: int) -> tuple:
        k = step * self.tiles.block_k + slab * SLAB_K
        # Past the end of K x is 0, and any group serves.
        group = jnp.minimum(_divide(k, self.spec.group_size)[0], self.spec.groups - 1)
        return tuple(
            plgpu.load(weight[name].at[group, pl.ds(self.column, self.block_n)])
            for name in ("scale", "zero_point")
            if name in weight
        )

    def add_step(self, weights, groups, step: jax.Array, rows: jax.Array, sums: list) -> list:
        """Add the products of `block_k` input features to `sums`."""
        spec, tiles = self.spec, self.tiles
        words = [
            [self.load_words(w, step, tile) for tile in range(tiles.block_k // spec.tile_k)]
            for w in weights
        ]
        summed_apart = not self.is_mixed and spec.groups > 1 and tiles.scale_on == "sum"
        for run, first in enumerate(self.count_slabs()):
            parts = [jnp.zeros_like(total) for total in sums] if summed_apart else list(sums)
            for slab in range(first, first + self.group_slabs):
                k = step * tiles.block_k + slab * SLAB_K
                tile, plane = divmod(slab, spec.planes)
                x = self.load_x(rows, k)
                for i, weight in enumerate(weights):
                    if self.is_mixed:
                        scale, *zero = self.load_each(weight, k)
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

    def load_words(self, weight: Any, step: jax.Array, tile: int) -> jax.Array:
        """The words [block_n, 32] of one packed tile along K."""
        spec, per_step = self.spec, self.tiles.block_k // self.spec.tile_k
        place = step * per_step + tile
        if spec.tiles_k % per_step:
            place = jnp.minimum(place, spec.tiles_k - 1)
        tiles_n = pl.ds(_divide(self.column, TILE_N)[0], self.block_n // TILE_N)
        return plgpu.load(weight["packed"].at[tiles_n, place]).reshape(self.block_n, SLAB_K)

    def load_x(self, rows: jax.Array, k: jax.Array) -> jax.Array:
        """x [block_m, 32] from input feature k on, 0 past the end of K."""
        columns = k + jnp.arange(SLAB_K, dtype=jnp.int32)
        at = self.x_ref.at[rows[:, None], columns[None, :]]
        if self.spec.in_features % self.tiles.block_k == 0:
            return plgpu.load(at)
        return plgpu.load(at, mask=(columns < self.spec.in_features)[None, :], other=0)

    def unpack(self, words: jax.Array, zero: Sequence[jax.Array], number: int) -> jax.Array:
        """q - zero_point of one plane [block_n, 32], exact in the dtype of x."""
        dtype = self.x_ref.dtype
        plane = describe_plane(self.spec.bits, number, dtype)
        # Converted before it is spread over the features: Triton would do it for each of them.
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

    def load_each(self, weight: Any, k: jax.Array) -> tuple:
        """(scale, zero point if any) of each of 32 input features, [block_n, 32]."""
        features = k + jnp.arange(SLAB_K, dtype=jnp.int32)
        groups = _divide(features, self.spec.group_size)[0][None, :]
        columns = (self.column + jnp.arange(self.block_n, dtype=jnp.int32))[:, None]
        mask = groups < self.spec.groups
        return tuple(
            plgpu.load(weight[name].at[groups, columns], mask=mask, other=0)
            for name in ("scale", "zero_point")
            if name in weight
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
