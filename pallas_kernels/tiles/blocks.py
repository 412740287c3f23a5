"""Which token meets which expert, as blocks of rows that share one expert.

A *pair* is one choice of one token: pair t * top_k + j is token t with its j-th expert. Pairs are
ordered by expert (for one expert, by number). The pairs of each expert are padded to whole blocks,
so that a block is a small product with one weight:

    expert:  0 0 0 0 0 | 0 . . . . | 2 2 2 . . | 5 5 5 5 5 | ...      rows of blocks of 5
             block 0     block 1     block 2     block 3

The number of blocks depends on the ids; arrays have the size of the worst case. A stable sort finds
the blocks, in O(P log P) for P pairs. (For few pairs, a GPU uses one kernel without a sort,
`pallas_kernels.triton.grouping`.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


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
    """ids - offset, int32; `experts` where that is not in 0 .. experts - 1."""
    local = ids.astype(jnp.int32) - offset
    return jnp.where((local >= 0) & (local < experts), local, experts)


def group_pairs(local: jax.Array, experts: int, block: int) -> Blocks:
    """Group pairs by expert.

    Args:
      local: int32 [P], the expert of each pair; E if that expert is not here.
      experts: E.
      block: rows of a block.
    """
    total = local.shape[0]
    order = jnp.argsort(local, stable=True).astype(jnp.int32)
    counts = jnp.zeros(experts, jnp.int32).at[local].add(1, mode="drop")
    starts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    needed = (counts + (block - 1)) // block
    ends = jnp.cumsum(needed, dtype=jnp.int32)
    blocks = jnp.arange(count_blocks(total, experts, block), dtype=jnp.int32)
    numbers = jnp.sum(ends[None, :] <= blocks[:, None], axis=1, dtype=jnp.int32)
    expert = jnp.minimum(numbers, experts - 1)
    # how many pairs of its expert stand before each row, if it has a pair
    rows = jnp.arange(block, dtype=jnp.int32)
    before = (blocks - (ends - needed)[expert])[:, None] * block + rows[None, :]
    place = jnp.minimum(starts[expert][:, None] + before, total - 1)
    is_pair = (numbers < experts)[:, None] & (before < counts[expert][:, None])
    return Blocks(numbers, jnp.where(is_pair, order[place], total))
