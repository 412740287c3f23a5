"""Pairs grouped by expert, by XLA and by the kernel, against an enumeration."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.tiles.blocks import Blocks, count_blocks, find_local, group_pairs
from pallas_kernels.triton.grouping import group_few_pairs
from pallas_kernels.xla.experts import choose_rows
from tests.grids import cover
from tests.jaxprs import find_largest

_by_xla = jax.jit(group_pairs, static_argnums=(1, 2))
_by_kernel = jax.jit(
    lambda local, experts, block: group_few_pairs(local, experts, block, interpret=True),
    static_argnums=(1, 2),
)
WAYS = {"xla": _by_xla, "kernel": _by_kernel}


def enumerate_blocks(local: np.ndarray, experts: int, block: int) -> tuple[list, list]:
    """The expert and the rows of every block, one by one."""
    found, rows = [], []
    for expert in range(experts):
        pairs = np.flatnonzero(local == expert).tolist()
        for start in range(0, len(pairs), block):
            some = pairs[start : start + block]
            found.append(expert)
            rows.append(some + [len(local)] * (block - len(some)))
    return found, rows


def assert_grouped(way: str, local: np.ndarray, experts: int, block: int) -> None:
    blocks: Blocks = WAYS[way](jnp.asarray(local, jnp.int32), experts, block)
    found, rows = enumerate_blocks(local, experts, block)
    numbers = np.asarray(blocks.experts).tolist()
    assert numbers == found + [experts] * (len(numbers) - len(found))
    assert np.asarray(blocks.pairs)[: len(found)].tolist() == rows
    if way == "xla":
        assert (np.asarray(blocks.pairs)[len(found) :] == len(local)).all()


@pytest.mark.parametrize(
    ("pairs", "experts", "block", "way"),
    cover(
        [
            (1, 1, 8),
            (8, 8, 8),
            (24, 3, 8),
            (300, 128, 8),
            (600, 5, 16),
            (700, 8, 64),
            (2, 256, 8),
            # numbers of experts with two digits of 32
            (700, 513, 8),
            (300, 300, 8),
            (900, 1024, 16),
        ],
        list(WAYS),
    ),
)
def test_pairs_are_grouped_by_expert_in_their_order(way, pairs, experts, block):
    """Some pairs have no expert here; more than one chunk of 128 pairs is met."""
    local = np.random.default_rng(pairs).integers(0, experts + 1, pairs)
    assert_grouped(way, local, experts, block)


def test_pairs_of_65536_tokens_are_grouped_in_arrays_that_grow_no_faster_than_pairs():
    """Primitives are linear in the sizes of arrays, but for the one sort."""
    local = np.random.default_rng(0).integers(0, 129, 8 * 65_536)
    assert_grouped("xla", local, 128, 128)
    larger, smaller = (
        find_largest(lambda local: group_pairs(local, 128, 128), jnp.zeros(pairs, jnp.int32))
        for pairs in (local.size, local.size // 4)
    )
    assert larger <= 4 * smaller


@pytest.mark.parametrize("way", WAYS)
def test_every_pattern_of_experts_without_tokens(way):
    rng = np.random.default_rng(0)
    for pattern in itertools.product((False, True), repeat=8):
        chosen = np.flatnonzero(pattern)
        assert_grouped(way, rng.choice(chosen, 24) if chosen.size else np.full(24, 8), 8, 8)


@pytest.mark.parametrize("way", WAYS)
def test_all_pairs_may_have_one_expert(way):
    assert_grouped(way, np.full(300, 6), 8, 16)


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any),
    block=st.sampled_from([1, 2, 8, 16]),
)
def test_the_worst_case_holds_every_choice_and_is_met_by_one(counts, block):
    pairs, experts = sum(counts), len(counts)
    needed = sum(-(-count // block) for count in counts)
    most = count_blocks(pairs, experts, block)
    assert needed <= most
    # as many experts as possible with one pair more than whole blocks
    chosen = min(pairs, experts)
    worst = [1 + (pairs - chosen) // block * block, *[1] * (chosen - 1)]
    assert sum(-(-count // block) for count in worst) == most


@settings(deadline=None, max_examples=100)
@given(pairs=st.integers(1, 100_000), experts=st.integers(1, 512))
def test_there_are_at_most_three_rows_a_pair_on_the_xla_path(pairs, experts):
    block = choose_rows(pairs, experts)
    assert count_blocks(pairs, experts, block) * block <= 3 * pairs


def test_ids_outside_of_the_experts_here_have_none():
    ids = jnp.asarray([-1, 0, 3, 4, 7, 8, 2**31 - 1], jnp.int32)
    assert find_local(ids, 4, 4).tolist() == [4, 4, 4, 0, 3, 4, 4]
    assert find_local(ids, 4, jnp.int32(0)).tolist() == [4, 0, 3, 4, 4, 4, 4]
