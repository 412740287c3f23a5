"""`pallas_kernels.tiles.blocks.group_pairs` in one kernel, for few pairs.

As XLA fusions it would be about ten kernels, each waiting for the one before. For few tokens that
would take as long as reading the weights. Here each expert has a program, which counts the pairs of
all experts (so that it knows where its blocks begin) and places its own.

Counting is a product. With an expert's number written in two digits, e = high * S + low,

    counts[high, low] = sum over pairs of [their high = high] * [their low = low]

This multiplies two matrices of zeros and ones, which is exact on the tensor cores. Each pair is
compared with 2 sqrt(E) digits instead of E experts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tiles.blocks import Blocks, count_blocks
from pallas_kernels.triton.walk import divide

MOST_PAIRS = 4096
"""Above this, each program's pass over all pairs would take longer than the fusions."""

_CHUNK = 128


def group_few_pairs(
    local: jax.Array, experts: int, block: int, *, interpret: bool = False
) -> Blocks:
    """As `group_pairs`, but pairs of blocks past the last one are undefined."""
    most = count_blocks(local.shape[0], experts, block)
    run = functools.partial(_group_one, experts=experts, block=block)
    shapes = (
        jax.ShapeDtypeStruct((most,), jnp.int32),
        jax.ShapeDtypeStruct((most * block,), jnp.int32),
    )
    numbers, pairs = pl.pallas_call(
        run,
        out_shape=shapes,
        grid=(experts,),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(local)
    return Blocks(numbers, pairs.reshape(most, block))


def _group_one(local_ref, experts_ref, pairs_ref, *, experts: int, block: int) -> None:
    """Write the blocks of one expert; the last program also marks those past the last."""
    expert, total = pl.program_id(0), local_ref.shape[0]
    chunk = jnp.arange(_CHUNK, dtype=jnp.int32)
    highs, lows = (jnp.arange(size, dtype=jnp.int32) for size in _choose_digits(experts))

    def load(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        places = i * _CHUNK + chunk
        return places, plgpu.load(local_ref.at[places], mask=places < total, other=experts)

    def count(i: jax.Array, counts: jax.Array) -> jax.Array:
        high, low = divide(load(i)[1], lows.size)
        is_high, is_low = (
            (digits[:, None] == digit[None, :]).astype(jnp.bfloat16)
            for digits, digit in ((highs, high), (lows, low))
        )
        return counts + plgpu.dot(is_high, is_low, trans_b=True)

    chunks = pl.cdiv(total, _CHUNK)
    counts = lax.fori_loop(0, chunks, count, jnp.zeros((highs.size, lows.size), jnp.float32))
    counts = counts.astype(jnp.int32)
    needed = lax.div(counts + (block - 1), jnp.full_like(counts, block))
    numbers = highs[:, None] * lows.size + lows[None, :]
    # one axis after the other: jax 0.12 lowers no sum over two under a mesh with explicit axes
    first = jnp.where(numbers < expert, needed, 0).sum(axis=1).sum(axis=0)

    def place(i: jax.Array, before: jax.Array) -> jax.Array:
        places, keys = load(i)
        chosen = (keys == expert).astype(jnp.int32)
        # int32 from the start: a sum of booleans would be a float
        rank = before + jnp.cumsum(chosen) - chosen
        plgpu.store(pairs_ref.at[first * block + rank], places, mask=keys == expert)
        return before + jnp.sum(chosen)

    mine = lax.fori_loop(0, chunks, place, jnp.int32(0))
    blocks = lax.div(mine + (block - 1), jnp.full_like(mine, block))
    rest = mine + jnp.arange(block, dtype=jnp.int32)
    plgpu.store(
        pairs_ref.at[first * block + rest], jnp.full_like(rest, total), mask=rest < blocks * block
    )

    def mark(start: jax.Array, stop: jax.Array, number: jax.Array) -> None:
        def run(i: jax.Array, _: None) -> None:
            places = start + i * _CHUNK + chunk
            plgpu.store(experts_ref.at[places], jnp.full_like(places, number), mask=places < stop)

        lax.fori_loop(0, pl.cdiv(experts_ref.shape[0], _CHUNK), run, None)

    mark(first, first + blocks, expert)

    @pl.when(expert == experts - 1)
    def mark_rest() -> None:
        mark(first + blocks, jnp.int32(experts_ref.shape[0]), jnp.int32(experts))


def _choose_digits(experts: int) -> tuple[int, int]:
    """Powers of two, at least the 16 of a tensor core, with a product of at least `experts`."""
    bits = max(8, (experts - 1).bit_length())
    return 1 << (bits - bits // 2), 1 << bits // 2
