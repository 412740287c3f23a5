"""Matrices in shared memory that the tensor cores read by a descriptor.

Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" (`wgmma`) and "Shared
memory descriptor" (`tcgen05`): start, stride between groups of 8 rows, and swizzle, all but the
last in units of 16 bytes. Rows of 128, 64 or 32 bytes stand one below the other; within 8 of them
the chunks of 16 bytes change places: bits 4 to 6 of an address are xored with bits 7 to 9 (one or
two bits where rows are shorter).

Only what XLA's Triton writes is known: 16-bit numbers, K contiguous, a swizzle, its pattern
beginning where 1024 (512, 256) divides the address.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.block import U16, Block
from tests.ptx.faults import check
from tests.ptx.opcodes.floats import widen
from tests.ptx.opcodes.table import TYPES
from tests.ptx.parse import Refused

WGMMA_SWIZZLES = {1: 128, 2: 64, 3: 32}
"""Bits 62 and 63 -> bytes of a row."""
TCGEN05_SWIZZLES = {2: 128, 4: 64, 6: 32}
"""Bits 61 to 63 -> bytes of a row."""
_K = 16


def find_chunks(start: int, stride: int, row_bytes: int, rows: int) -> np.ndarray:
    """Addresses [rows, 2] of the chunks of 8 numbers of a matrix [rows, 16]."""
    row, chunk = np.arange(rows)[:, None], np.arange(2)[None, :]
    plain = start + row // 8 * stride + row % 8 * row_bytes + 16 * chunk
    return plain ^ ((plain >> 7 & row_bytes // 16 - 1) << 4)


def read_matrix(
    block: Block, descriptor: int, rows: int, kind: str, swizzles: dict[int, int], warp: int
) -> tuple[np.ndarray, tuple]:
    """float64 [rows, 16], and the token of `Shared.read_async`; `warp` as that takes it."""
    mode = descriptor >> 61 if swizzles is TCGEN05_SWIZZLES else descriptor >> 62
    if mode not in swizzles or descriptor >> 49 & 0b111:
        raise Refused(f"matrix descriptor {descriptor:#x}")
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    row_bytes = swizzles[mode]
    check(stride % (8 * row_bytes) == 0, "rows of a matrix overlap or break its swizzle")
    chunks = find_chunks(start, stride, row_bytes, rows)
    data, token = block.shared.read_async(chunks.reshape(-1), 16, warp)
    return widen(data.view(U16).reshape(rows, _K).view(TYPES[kind])), token
