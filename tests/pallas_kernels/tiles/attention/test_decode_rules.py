"""Slots are shared out among splits: each that is seen once, and no other."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tiles.attention.decode_rules import (
    choose_division,
    count_blocks,
    find_seen,
    find_span,
    pad,
)
from pallas_kernels.tiles.device import UNKNOWN, Device

SLOTS = 150
DEVICES = (
    Device("NVIDIA A100-SXM4-80GB", 108),
    Device("NVIDIA L4", 58),
    Device("NVIDIA H200", 132),
    Device("NVIDIA B200", 148),
    UNKNOWN,
)


@pytest.mark.parametrize("window", [None, 1, 2, 16, 17, 64, 149, 150, 151, 1000])
def test_seen_are_the_slots_before_the_position_and_within_the_window(window):
    position = jnp.arange(SLOTS, dtype=jnp.int32)
    first, end = find_seen(position, jnp.ones_like(position), window)
    slot = np.arange(SLOTS)[None]
    # the own slot is the window's last
    seen = (slot < position[:, None]) & (slot > position[:, None] - (window or SLOTS + 1))
    found = (slot >= np.asarray(first)[:, None]) & (slot < np.asarray(end)[:, None])
    np.testing.assert_array_equal(found, seen)


def test_an_inactive_row_sees_nothing():
    position = jnp.array([0, 7, SLOTS + 5, -3, 2**31 - 1], jnp.int32)
    first, end = find_seen(position, jnp.zeros_like(position), 5)
    np.testing.assert_array_equal(first, end)


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 8, 64])
def test_every_slot_is_in_one_split_and_in_one_block_of_it(splits):
    """All spans within 150 slots."""
    first, end = (
        jnp.array(both, jnp.int32)[:, None]
        for both in zip(*itertools.combinations_with_replacement(range(SLOTS + 1), 2), strict=True)
    )
    split = jnp.broadcast_to(jnp.arange(splits, dtype=jnp.int32)[None], (first.size, splits))
    whole = (jnp.broadcast_to(bound, split.shape) for bound in (first, end))
    span = jax.jit(lambda *a: tuple(vars(find_span(a[0], a[1], splits, a[2])).values()))(
        *whole, split
    )
    start, stop, works = map(np.asarray, span)
    first, end = np.asarray(first), np.asarray(end)
    has_slots = start < stop
    sizes = np.where(has_slots, stop - start, 0)
    np.testing.assert_array_equal(sizes.sum(1), (end - first)[:, 0])
    np.testing.assert_array_equal(works, has_slots | (np.arange(splits) == 0)[None])
    # in order, without a gap: with the sizes above, each slot once
    assert (start[:, 0] == first[:, 0]).all()
    assert (np.where(has_slots, (start >= first) & (stop <= end), True)).all()
    follows = start[:, 1:] == np.maximum.accumulate(np.where(has_slots, stop, first), 1)[:, :-1]
    assert (follows | ~has_slots[:, 1:]).all()
    # evenly: no split has more than its share, rounded up to 16
    assert (sizes <= 16 * np.ceil(np.ceil((end - first) / splits) / 16)).all()


@pytest.mark.parametrize("block", [16, 64])
def test_blocks_cover_a_span_and_no_more(block):
    lengths = jnp.arange(-40, 200, dtype=jnp.int32)
    span = find_span(jnp.zeros_like(lengths), jnp.maximum(lengths, 0), 1, jnp.int32(0))
    expected = -(-np.maximum(np.asarray(lengths), 0) // block)
    np.testing.assert_array_equal(count_blocks(span, block), expected)


def test_a_short_row_of_a_long_cache_reads_one_block():
    split = jnp.arange(32, dtype=jnp.int32)
    ten = jnp.full_like(split, 10)
    span = find_span(jnp.zeros_like(ten), ten, 32, split)
    assert int(count_blocks(span, 64).sum()) == 1


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.kind)
def test_blocks_fit_a_program_and_powers_of_two_fit_triton(device):
    for lines, slots, features in itertools.product(
        (1, 4, 8, 64, 512, 4096), (1, 17, 128, 500, 4096, 131072), (16, 64, 80, 128, 256, 512)
    ):
        found = choose_division(lines, slots, features, features, device)
        assert found.block == pad(found.block) >= 16
        assert found.splits == pad(found.splits)
        assert found.splits == 1 or slots // found.splits >= 128
        assert found.splits == 1 or lines * found.splits <= 2 * device.cores
        ahead = (found.stages - 1) * found.block * 4 * pad(features)
        assert ahead <= device.shared_memory


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.kind)
@pytest.mark.parametrize("lines", [1, 2, 4, 8, 32, 128])
def test_long_caches_keep_every_core_busy(device, lines):
    found = choose_division(lines, 1 << 16, 128, 128, device)
    assert found.splits == 64 or lines * found.splits >= device.cores


def test_many_rows_need_no_split():
    assert choose_division(512, 4096, 128, 128, DEVICES[2]).splits == 1
