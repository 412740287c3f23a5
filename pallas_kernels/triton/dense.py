"""Dense products: multiply by packed weights without expanding them in memory, or expand one.

Programs are numbered along one axis, so `vmap` over stacked weights has two axes of the grid left.
A tile that would pass the end of N starts earlier instead and computes some features twice, and
tokens past the end repeat the last one. `pallas_kernels.triton.walk` computes a tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.errors import BackendError
from pallas_kernels.format.spec import SLAB_K, TILE_N, QuantSpec
from pallas_kernels.formulas.activations import IN_KERNEL, apply
from pallas_kernels.tiles.device import Device, find_device
from pallas_kernels.tiles.tiles import Tiles, find_faults, fits
from pallas_kernels.triton.parts import Parts, finish
from pallas_kernels.triton.walk import Strip, Walk, divide

_ACTIVATIONS = (jnp.bfloat16, jnp.float16)
Weights = Mapping[str, jax.Array]


def multiply_packed(
    x: jax.Array,
    weights: Sequence[Weights],
    specs: Sequence[QuantSpec],
    tiles: Tiles,
    *,
    activation: str | None = None,
    interpret: bool = False,
) -> list[jax.Array]:
    """Compute x @ W.T + bias for weights that share x, in one kernel.

    Args:
      x: [M, K] bfloat16 or float16, M >= 1.
      weights: leaf dicts (`pallas_kernels.format.weights`), without "perm".
      specs: their specs, equal in all but `out_features`.
      tiles: how the work is divided.
      activation: take two weights of equal size as gate and up: the result is act(gate) * up.
      interpret: run as ordinary XLA operations, slowly but on any device, instead of on a GPU.

    Returns:
      [M, N] for each weight, in the dtype of x; one array if gated.

    Raises:
      BackendError: if x is not bfloat16 or float16 or has no rows, or the tiles do not fit.
    """
    options = {"activation": activation, "interpret": interpret}
    return finish(multiply_in_parts(x, weights, specs, tiles, **options), x.dtype, activation)


def multiply_in_parts(
    x: jax.Array,
    weights: Sequence[Weights],
    specs: Sequence[QuantSpec],
    tiles: Tiles,
    *,
    activation: str | None = None,
    interpret: bool = False,
) -> list[Parts]:
    """As `multiply_packed`, before the splits of K are added.

    Returns:
      `Parts` of [M, N] for each weight. With an activation, those of gate and up, or the finished
      product alone where one program holds both.

    Raises:
      BackendError: as `multiply_packed`.
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
    scale_dtype = weights[0]["scale"].dtype
    paired = (
        activation in IN_KERNEL
        and not split
        and can_pair(specs[0], tiles, scale_dtype, find_device())
    )
    jobs = [tuple(range(len(specs)))] if paired else [(i,) for i in range(len(specs))]
    lead = (tiles.splits,) if split else ()
    dtype = jnp.float32 if split else x.dtype
    outputs = [
        jax.ShapeDtypeStruct((*lead, x.shape[0], specs[job[0]].out_features), dtype) for job in jobs
    ]
    blocks = [choose_block_n(specs[job[0]], tiles) for job in jobs]
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
            activation=activation,
            plain=interpret,
        ),
        out_shape=outputs,
        grid=(pl.cdiv(x.shape[0], tiles.block_m) * sum(widths) * tiles.splits,),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
    )(x, inputs)
    if split:
        return [Parts(sums, w.get("bias")) for sums, w in zip(out, weights, strict=True)]
    return [Parts(y[None]) for y in out]


def can_pair(spec: QuantSpec, tiles: Tiles, scale_dtype, device: Device) -> bool:
    """Whether one program can hold the words and, in registers, the sums of gate and up."""
    most = 32 if spec.groups == 1 or spec.group_size >= 128 else 8
    before_hopper = not (device.is_hopper or device.is_blackwell)
    crowded = (
        spec.bits == 8
        and spec.groups > 1
        and (tiles.warps == 2 or (tiles.block_m == 32 and before_hopper))
    )
    pair = dataclasses.replace(tiles, block_n=2 * tiles.block_n)
    return tiles.block_m <= most and not crowded and fits(pair, spec, scale_dtype, device)


def choose_block_n(spec: QuantSpec, tiles: Tiles) -> int:
    """Features of one program, at most those there are."""
    padded = spec.tiles_n * TILE_N
    return min(tiles.block_n, 1 << (padded.bit_length() - 1))


def _multiply_tile(
    x_ref,
    weights,
    *out_refs,
    jobs,
    blocks,
    widths,
    specs,
    tiles: Tiles,
    activation: str | None,
    plain: bool,
) -> None:
    """Compute one tile of one output.

    Token tiles run fastest, so that programs which share a tile of the weight meet in the cache;
    then features, then splits.
    """
    program = pl.program_id(0)
    rest, token_tile = divide(program, pl.cdiv(x_ref.shape[0], tiles.block_m))
    split, place = divide(rest, sum(widths))
    tokens = token_tile * tiles.block_m + jnp.arange(tiles.block_m, dtype=jnp.int32)
    first = 0
    for job, block, width, out_ref in zip(jobs, blocks, widths, out_refs, strict=True):
        spec = specs[job[0]]
        # the last tile may start earlier, within the padded rows
        column = jnp.minimum((place - first) * block, spec.tiles_n * TILE_N - block)
        rows = jnp.minimum(tokens, x_ref.shape[0] - 1)
        walk = Walk(x_ref, rows, spec, tiles, block, plain)
        strips = [Strip(weights[i], column) for i in job]
        run = functools.partial(_finish_tile, walk, strips, tokens, out_ref, split, activation)
        if len(jobs) == 1:
            run()
        else:
            pl.when((place >= first) & (place < first + width))(run)
        first += width


def _finish_tile(
    walk: Walk,
    strips: list[Strip],
    tokens: jax.Array,
    out_ref: Any,
    split: jax.Array,
    activation: str | None,
) -> None:
    """Walk along K, then bias, activation and store."""
    spec, column = walk.spec, strips[0].column
    columns = column + jnp.arange(walk.block_n, dtype=jnp.int32)
    sums = walk.sum_along_k(strips, split)
    for i, strip in enumerate(strips):
        if "bias" in strip.leaves:
            bias = strip.leaves["bias"].at[columns]
            bias = plgpu.load(bias, mask=columns < spec.out_features, other=0)
            sums[i] = sums[i] + bias.astype(jnp.float32)[:, None]
    y = sums[0]
    if len(sums) > 1:
        assert activation is not None
        y = apply(activation, *sums)
    mask = (tokens < walk.x_ref.shape[0])[:, None] & (columns < spec.out_features)[None, :]
    lead = (split,) if walk.tiles.splits > 1 else ()
    tile = out_ref.at[*lead, tokens[:, None], columns[None, :]]
    plgpu.store(tile, y.T.astype(out_ref.dtype), mask=mask)


def expand_by_kernel(
    weights: Weights, spec: QuantSpec, dtype, *, interpret: bool = False
) -> jax.Array:
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
    tile_n, tile_k = divide(pl.program_id(0), spec.tiles_k)
    tiles = Tiles(block_m=8, block_n=TILE_N, block_k=spec.tile_k)
    walk = Walk(out_ref, jnp.zeros(8, jnp.int32), spec, tiles, TILE_N, plain)
    strip = Strip(weights, tile_n * TILE_N)
    words = walk.load_words(strip, tile_k, 0)
    rows = strip.column + jnp.arange(TILE_N, dtype=jnp.int32)[:, None]
    for plane in range(spec.planes):
        k = tile_k * spec.tile_k + plane * SLAB_K
        if spec.is_mixed:
            scale, *zero = walk.load_each(strip, k)
        else:
            scale, *zero = walk.load_group(strip, tile_k, plane)
            scale = scale[:, None]
        w = walk.unpack(words, zero, plane).astype(jnp.float32) * scale.astype(jnp.float32)
        columns = k + jnp.arange(SLAB_K, dtype=jnp.int32)[None, :]
        mask = (rows < spec.out_features) & (columns < spec.in_features)
        plgpu.store(out_ref.at[rows, columns], w.astype(out_ref.dtype), mask=mask)
