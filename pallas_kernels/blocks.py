"""Which token meets which expert, as blocks of rows that share one expert.

A *pair* is one choice of one token: pair t * top_k + j is token t with its j-th expert. Pairs are
ordered by expert (within one by number), and each expert's are padded to whole blocks, so that a
block is a small product with one weight:

    expert:  0 0 0 0 0 | 0 . . . . | 2 2 2 . . | 5 5 5 5 5 | ...      rows of blocks of 5
             block 0     block 1     block 2     block 3

How many blocks there are depends on the ids; arrays have the size of the worst case. There is no
sort and no prefix sum: every number is a masked count, and XLA makes a few fusions of it. (A GPU
has one kernel for it while there are few pairs, `pallas_kernels.triton.grouping`.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_CHUNK = 256


class Blocks(NamedTuple):
    """Blocks of pairs.

    Attributes:
      experts: int32 [B], the expert of each block; E for blocks past the last.
      pairs: int32 [B, block], the pair of each row; T * top_k for rows without one. None where
        block b is pair b and nothing else.
    """

    experts: jax.Array
    pairs: jax.Array | None


def count_blocks(pairs: int, experts: int, block: int) -> int:
    """How many blocks of `block` rows any choice of experts can need.

    It is most when as many experts as possible have one row more than whole blocks.
    """
    chosen = min(pairs, experts)
    return chosen + (pairs - chosen) // block


def find_local(ids: jax.Array, experts: int, offset: jax.Array | int) -> jax.Array:
    """ids - offset, int32; `experts` where that is no expert of 0 .. experts - 1."""
    local = ids.astype(jnp.int32) - offset
    return jnp.where((local >= 0) & (local < experts), local, experts)


def group_pairs(local: jax.Array, experts: int, block: int) -> Blocks:
    """Group pairs by expert.

    Args:
      local: int32 [P], the expert of each pair, E for a pair without one here.
      experts: E.
      block: rows of a block.
    """
    total = local.shape[0]
    chunk = min(_CHUNK, total)
    chunks = -(-total // chunk)
    keys = jnp.pad(local, (0, chunks * chunk - total), constant_values=experts)
    keys = keys.reshape(chunks, chunk)
    places = jnp.arange(experts, dtype=jnp.int32)
    # how many pairs of the same expert come earlier: in the same chunk, and in those before
    same = keys[:, :, None] == keys[:, None, :]
    earlier = _count(same & _is_before(chunk)[None, :, :], axis=2)
    per_chunk = _count(keys[:, :, None] == places[None, None, :], axis=1)
    before = _sum(jnp.where(_is_before(chunks)[:, :, None], per_chunk[None, :, :], 0), axis=1)
    needed = (_sum(per_chunk, axis=0) + (block - 1)) // block
    first = _sum(jnp.where(_is_before(experts), needed[None, :], 0), axis=1)
    starts = first[None, :] * block + before
    row = jnp.take_along_axis(starts, jnp.minimum(keys, experts - 1), axis=1) + earlier
    most = count_blocks(total, experts, block)
    numbers = jnp.arange(total, dtype=jnp.int32)
    row = jnp.where(local < experts, row.reshape(-1)[:total], most * block + numbers)
    pairs = jnp.full(most * block, total, jnp.int32)
    pairs = pairs.at[row].set(numbers, mode="drop", unique_indices=True)
    ends = (first + needed)[None, :]
    blocks = jnp.arange(most, dtype=jnp.int32)[:, None]
    return Blocks(_count(ends <= blocks, axis=1), pairs.reshape(most, block))


def _is_before(size: int) -> jax.Array:
    """bool [size, size]: whether the column comes before the row."""
    places = jnp.arange(size, dtype=jnp.int32)
    return places[None, :] < places[:, None]


def _count(mask: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(mask, axis=axis, dtype=jnp.int32)


def _sum(numbers: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(numbers, axis=axis, dtype=jnp.int32)
