"""How attention of a piece is divided: rows of queries by blocks of slots."""

from __future__ import annotations

import dataclasses

from pallas_kernels.tiles.device import Device

_LEAST = 16
"""The fewest rows and slots that a tensor core multiplies."""


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


def choose_flash(rows: int, head_dim: int, device: Device) -> FlashTiles:
    """The tiles for `rows` rows of one key head.

    Registers hold the sums of a program, block_m x head_dim, and its scores, block_m x block_n. So
    both blocks shrink as heads grow; the blocks are the largest that were compiled without spills.
    """
    wide = pad_head_dim(head_dim)
    if device.is_hopper or device.is_blackwell:
        block_m, block_n, warps, stages = _RECENT[min(wide, 512)]
    else:
        block_m, block_n, warps, stages = _OLDER[min(wide, 512)]
    fitting = max(_LEAST, 1 << (rows - 1).bit_length())
    return FlashTiles(block_m=min(block_m, fitting), block_n=block_n, warps=warps, stages=stages)


def pad_head_dim(head_dim: int) -> int:
    """The power of two that a block has."""
    return max(_LEAST, 1 << (head_dim - 1).bit_length())


_RECENT = {
    16: (128, 64, 4, 3),
    32: (128, 64, 4, 3),
    64: (128, 128, 8, 3),
    128: (128, 128, 8, 2),
    256: (128, 64, 8, 2),
    512: (64, 16, 8, 2),
}
_OLDER = {
    16: (128, 64, 4, 2),
    32: (128, 64, 4, 2),
    64: (128, 64, 4, 2),
    128: (128, 64, 8, 2),
    256: (64, 32, 8, 2),
    512: (32, 32, 8, 1),
}
