"""`pallas_kernels.blocks.group_pairs` in one kernel, for few pairs.

As XLA fusions it is about ten kernels, each of which waits for the one before: for few tokens that
would take as long as reading the weights. Here each expert has a program, which counts the pairs of
all experts (so that it knows where its blocks begin) and places its own.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.blocks import Blocks, count_blocks

MOST_PAIRS = 4096
"""Above, every program's way over all pairs would take longer than the fusions."""

_CHUNK = 128


def group_few_pairs(
    local: jax.Array, experts: int, block: int, *, interpret: bool = False
) -> Blocks:
    """`group_pairs`, but pairs of blocks past the last one are anything."""
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
    """Write the blocks of one expert; the first program also marks those past the last."""
    expert, total = pl.program_id(0), local_ref.shape[0]
    chunk = jnp.arange(_CHUNK, dtype=jnp.int32)
    numbers = jnp.arange(1 << (experts - 1).bit_length(), dtype=jnp.int32)

    def load(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        places = i * _CHUNK + chunk
        return places, plgpu.load(local_ref.at[places], mask=places < total, other=experts)

    def count(i: jax.Array, counts: jax.Array) -> jax.Array:
        same = numbers[:, None] == load(i)[1][None, :]
        return counts + jnp.sum(same.astype(jnp.int32), axis=1)

    chunks = pl.cdiv(total, _CHUNK)
    counts = lax.fori_loop(0, chunks, count, jnp.zeros_like(numbers))
    needed = lax.div(counts + (block - 1), jnp.full_like(counts, block))
    # one past the last expert are the pairs without one
    needed = jnp.where(numbers < experts, needed, 0)
    first = jnp.sum(jnp.where(numbers < expert, needed, 0))
    mine = jnp.sum(jnp.where(numbers == expert, counts, 0))
    blocks = lax.div(mine + (block - 1), jnp.full_like(mine, block))

    def place(i: jax.Array, before: jax.Array) -> jax.Array:
        places, keys = load(i)
        chosen = (keys == expert).astype(jnp.int32)
        # int32 from the start: a sum of booleans would be a float
        rank = before + jnp.cumsum(chosen) - chosen
        plgpu.store(pairs_ref.at[first * block + rank], places, mask=keys == expert)
        return before + jnp.sum(chosen)

    lax.fori_loop(0, chunks, place, jnp.int32(0))
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

    @pl.when(expert == 0)
    def mark_rest() -> None:
        mark(jnp.sum(needed), jnp.int32(experts_ref.shape[0]), jnp.int32(experts))
