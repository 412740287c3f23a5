"""Products of blocks of rows, each with the weight of one expert.

One program computes `block_n` features for one block of `pallas_kernels.tiles.blocks`: it reads
which expert the block has and which pairs of token and expert are its rows, gathers those rows of
x, and writes each row of the result to the pair's own place. Programs of blocks past the last one
end at once. Features run fastest, so that programs which share rows of x, and blocks which share an
expert, meet in the cache.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.errors import BackendError
from pallas_kernels.format.spec import TILE_N, QuantSpec
from pallas_kernels.formulas.activations import apply
from pallas_kernels.tiles.blocks import Blocks
from pallas_kernels.tiles.tiles import Tiles, find_faults
from pallas_kernels.triton.dense import choose_block_n
from pallas_kernels.triton.walk import Strip, Walk, divide


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What happens to the sums of a tile, in float32.

    Attributes:
      activation: name of `pallas_kernels.formulas.activations`, None for none.
      paired: rows 0 .. N/2 - 1 of the weight are gate, the others up, and one program computes
        both.
      weigh: None, or "sum" (before the bias) or "result" (after it): multiply by the pair's weight.
    """

    activation: str | None = None
    paired: bool = False
    weigh: str | None = None


def multiply_blocks(
    x: jax.Array,
    stack: dict[str, jax.Array],
    spec: QuantSpec,
    blocks: Blocks,
    weights: jax.Array,
    tiles: Tiles,
    *,
    epilogue: Epilogue,
    dtype: Any,
    interpret: bool = False,
) -> jax.Array:
    """Compute x[pair // (P // R)] @ W[expert].T + b[expert] for every pair.

    Args:
      x: [R, K] bfloat16 or float16; R divides P.
      stack: leaf dict with E in front of every leaf.
      spec: of one expert.
      blocks: of `tiles.block_m` rows, or without rows: block b is then pair b.
      weights: float32 [P], of the pairs.
      tiles: how the work is divided.
      epilogue: what is done with the sums. With splits it has no activation.
      dtype: of the result.
      interpret: run as ordinary XLA operations.

    Returns:
      [P, N] ([P, N / 2] if paired), with splits [splits, P, N]. Rows of pairs in no block are
      undefined.

    Raises:
      BackendError: if x is not bfloat16 or float16, or the tiles do not fit.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise BackendError(f"the Triton kernel takes x in bfloat16 or float16, got {x.dtype.name}")
    if faults := find_faults(tiles, spec):
        raise BackendError(f"{tiles} does not fit {spec}: " + "; ".join(faults))
    if tiles.scale_on == "weight" and stack["scale"].dtype != x.dtype:
        raise BackendError(
            f"scale_on='weight' needs scales of the dtype of x, {x.dtype.name}, "
            f"got {stack['scale'].dtype.name}"
        )
    total, features = weights.shape[0], spec.out_features // (2 if epilogue.paired else 1)
    half = dataclasses.replace(spec, out_features=features)
    block_n = choose_block_n(half, tiles)
    width = pl.cdiv(half.tiles_n * TILE_N, block_n)
    lead = (tiles.splits,) if tiles.splits > 1 else ()
    run = functools.partial(
        _multiply_block,
        spec=spec,
        columns_n=half.tiles_n * TILE_N,
        tiles=tiles,
        block_n=block_n,
        width=width,
        epilogue=epilogue,
        plain=interpret,
    )
    return pl.pallas_call(
        run,
        out_shape=jax.ShapeDtypeStruct((*lead, total, features), dtype),
        grid=(blocks.experts.shape[0] * width * tiles.splits,),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
    )(x, stack, blocks, weights)


def _multiply_block(
    x_ref,
    stack,
    blocks,
    weights_ref,
    out_ref,
    *,
    spec: QuantSpec,
    columns_n: int,
    tiles: Tiles,
    block_n: int,
    width: int,
    epilogue: Epilogue,
    plain: bool,
) -> None:
    """Compute one tile of one block, for one part of K."""
    rest, place = divide(pl.program_id(0), width)
    split, block = divide(rest, blocks.experts.shape[0])
    expert = plgpu.load(blocks.experts.at[block])

    @pl.when(expert < stack["packed"].shape[0])
    def run() -> None:
        total = weights_ref.shape[0]
        row = jnp.arange(tiles.block_m, dtype=jnp.int32)
        if blocks.pairs is None:
            pairs = jnp.where(row == 0, block, total)
        else:
            pairs = plgpu.load(blocks.pairs.at[block, pl.ds(0, tiles.block_m)])
        rows = divide(jnp.minimum(pairs, total - 1), total // x_ref.shape[0])[0]
        walk = Walk(x_ref, rows, spec, tiles, block_n, plain)
        # the last tile may start earlier, within the padded rows
        column = jnp.minimum(place * block_n, columns_n - block_n)
        starts = (column, spec.out_features // 2 + column) if epilogue.paired else (column,)
        strips = [Strip(stack, start, (expert,)) for start in starts]
        sums = walk.sum_along_k(strips, split)
        factor = plgpu.load(weights_ref.at[jnp.minimum(pairs, total - 1)])[None, :]
        results = [
            _finish(y, strip, factor, split, walk, epilogue)
            for y, strip in zip(sums, strips, strict=True)
        ]
        y = results[0] if epilogue.activation is None else apply(epilogue.activation, *results)
        columns = column + jnp.arange(block_n, dtype=jnp.int32)
        mask = (pairs < total)[:, None] & (columns < out_ref.shape[-1])[None, :]
        lead = (split,) if tiles.splits > 1 else ()
        tile = out_ref.at[*lead, pairs[:, None], columns[None, :]]
        plgpu.store(tile, y.T.astype(out_ref.dtype), mask=mask)


def _finish(
    y: jax.Array, strip: Strip, factor: jax.Array, split: jax.Array, walk: Walk, epilogue: Epilogue
) -> jax.Array:
    """Weigh and add the bias, which belongs to the first split alone."""
    if epilogue.weigh == "sum":
        y = y * factor
    if "bias" in strip.leaves:
        columns = strip.column + jnp.arange(walk.block_n, dtype=jnp.int32)
        bias = strip.leaves["bias"].at[*strip.lead, columns]
        bias = plgpu.load(bias, mask=columns < walk.spec.out_features, other=0)
        bias = bias.astype(jnp.float32)
        if walk.tiles.splits > 1:
            bias = jnp.where(split == 0, bias, 0.0)
        y = y + bias[:, None]
    return y * factor if epilogue.weigh == "result" else y
