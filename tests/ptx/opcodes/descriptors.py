"""Matrices in shared memory that the tensor cores read by a descriptor.

Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" (`wgmma`) and "Shared
memory descriptor" (`tcgen05`): start, two strides, and swizzle, all but the last in units of 16
bytes. Rows of 128, 64 or 32 bytes stand one below the other, 8 of them at a time; within these the
chunks of 16 bytes change places: bits 4 to 6 of an address are xored with bits 7 to 9 (one or two
bits where rows are shorter).

A row is K numbers of one row of the matrix; or, if the matrix is transposed, one number of K of
each of its rows, as many as there is room for, and the next ones stand the "leading" stride
further. The other stride is that from 8 rows of memory to the next 8.

Only what XLA's Triton writes is known: 16-bit numbers, a swizzle, its pattern beginning where 1024
(512, 256) divides the address.
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


def find_transposed(start: int, strides: tuple[int, int], row_bytes: int, rows: int) -> np.ndarray:
    """Addresses [16, rows / 8] of the chunks of 8 rows of a transposed matrix [rows, 16].

    `strides`: from one row of memory full of a matrix' rows to the next, and of 8 numbers of K.
    """
    k, byte = np.arange(_K)[:, None], 16 * np.arange(rows // 8)[None, :]
    plain = start + k // 8 * strides[1] + k % 8 * row_bytes
    plain = plain + byte // row_bytes * strides[0] + byte % row_bytes
    return plain ^ ((plain >> 7 & row_bytes // 16 - 1) << 4)


def read_matrix(
    block: Block,
    descriptor: int,
    rows: int,
    kind: str,
    swizzles: dict[int, int],
    warp: int,
    *,
    transposed: bool = False,
) -> tuple[np.ndarray, tuple]:
    """float64 [rows, 16], and the token of `Shared.read_async`; `warp` as that takes it."""
    mode = descriptor >> 61 if swizzles is TCGEN05_SWIZZLES else descriptor >> 62
    if mode not in swizzles or descriptor >> 49 & 0b111:
        raise Refused(f"matrix descriptor {descriptor:#x}")
    start, lead, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    row_bytes = swizzles[mode]
    check(stride % (8 * row_bytes) == 0, "rows of a matrix overlap or break its swizzle")
    if transposed:
        chunks = find_transposed(start, (lead, stride), row_bytes, rows)
    else:
        chunks = find_chunks(start, stride, row_bytes, rows)
    data, token = block.shared.read_async(chunks.reshape(-1), 16, warp)
    shape = (_K, rows) if transposed else (rows, _K)
    found = widen(data.view(U16).reshape(shape).view(TYPES[kind]))
    return found.T if transposed else found, token
