"""The tiles of attention of a piece fit every GPU and every piece."""

from __future__ import annotations

import pytest

from pallas_kernels.tiles.attention.flash_rules import (
    choose_flash,
    measure_flash_memory,
    pad_head_dim,
)
from pallas_kernels.tiles.device import UNKNOWN, Device

DEVICES = (
    UNKNOWN,
    Device("NVIDIA L4", 58),
    Device("NVIDIA A100-SXM4-80GB", 108),
    Device("NVIDIA H200", 132),
    Device("NVIDIA B200", 148),
)
SIZES = (16, 64, 80, 96, 128, 192, 256, 512)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.kind)
@pytest.mark.parametrize("head_dim", SIZES)
def test_tiles_fit_shared_memory_and_are_powers_of_two(head_dim, device):
    for rows in (1, 16, 32, 64, 100, 1 << 16):
        tiles = choose_flash(rows, head_dim, device)
        assert measure_flash_memory(tiles, head_dim, device) <= device.shared_memory
        for size in (tiles.block_m, tiles.block_n, pad_head_dim(head_dim)):
            assert size >= 16
            assert size & (size - 1) == 0
        assert tiles.block_m < 2 * max(rows, 16)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.kind)
def test_sums_of_a_program_fit_its_registers(device):
    """Float32 sums and scores are at most three quarters of the 255 registers of a thread."""
    for head_dim in SIZES:
        tiles = choose_flash(1 << 16, head_dim, device)
        held = tiles.block_m * (pad_head_dim(head_dim) + tiles.block_n)
        assert held <= 192 * 32 * tiles.warps


def test_a_long_piece_on_hopper_has_a_whole_tile_for_each_warpgroup():
    assert choose_flash(1 << 16, 128, DEVICES[3]).block_m == 128
