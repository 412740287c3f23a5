"""How attention of a piece is divided: rows of queries by blocks of slots."""

from __future__ import annotations

import dataclasses

from pallas_kernels.tiles.device import Device

_LEAST = 16
"""The fewest rows, slots and features that a tensor core multiplies."""
_SPARE = 1024
"""Bytes of shared memory for barriers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashTiles:
    """One way to run the kernel.

    Attributes:
      block_m: rows of a program: queries times the heads that share a key head. A power of two.
      block_n: slots of a step. A power of two.
      warps: 32 threads each.
      stages: steps of the copy pipeline.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


# Registers hold the sums of a program, block_m x D, and its scores, block_m x block_n. So both
# shrink as heads grow. These are the largest without spills, with and without a window, that
# shared memory holds; a larger block_n has fewer instructions for each slot.
_RECENT = {
    64: FlashTiles(block_m=128, block_n=128, warps=8, stages=3),
    128: FlashTiles(block_m=128, block_n=128, warps=8, stages=2),
    256: FlashTiles(block_m=128, block_n=64, warps=8, stages=2),
    512: FlashTiles(block_m=64, block_n=16, warps=8, stages=2),
}
"""By features of a head, for tensor cores that read queries from shared memory."""
_OLDER = {
    64: FlashTiles(block_m=128, block_n=64, warps=8, stages=3),
    128: FlashTiles(block_m=128, block_n=64, warps=8, stages=3),
    256: FlashTiles(block_m=64, block_n=32, warps=8, stages=2),
    512: FlashTiles(block_m=32, block_n=32, warps=8, stages=1),
}


def choose_flash(rows: int, head_dim: int, device: Device) -> FlashTiles:
    """The tiles for `rows` rows of one key head: of a short piece, no more than it has."""
    table = _RECENT if device.is_hopper or device.is_blackwell else _OLDER
    tiles = table[min(max(pad_head_dim(head_dim), min(table)), max(table))]
    fitting = max(_LEAST, 1 << (rows - 1).bit_length())
    tiles = dataclasses.replace(tiles, block_m=min(tiles.block_m, fitting))
    if measure_flash_memory(tiles, head_dim, device) > device.shared_memory:
        tiles = dataclasses.replace(tiles, stages=tiles.stages - 1)
    return tiles


def pad_head_dim(head_dim: int) -> int:
    """The features that a block has: a power of two."""
    return max(_LEAST, 1 << (head_dim - 1).bit_length())


def measure_flash_memory(tiles: FlashTiles, head_dim: int, device: Device) -> int:
    """Bytes of shared memory one program takes at most, as the compiler was seen to lay it out.

    Keys and values of each stage, the queries where tensor cores read them there, and the weights
    of a step where several warps have the same rows and exchange them.
    """
    recent = device.is_hopper or device.is_blackwell
    lines = 2 * tiles.stages * tiles.block_n + (tiles.block_m if recent else 0)
    exchanged = tiles.block_m * tiles.block_n if tiles.block_m < 16 * tiles.warps else 0
    return 2 * (lines * pad_head_dim(head_dim) + exchanged) + _SPARE
