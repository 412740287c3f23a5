"""Matrices for the tests of tensor cores: drawn, put into registers, laid out in shared memory."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16


def draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Small whole numbers: every sum is exact."""
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(BF16)


def load(registers: int, first: int, array: int, threads: int) -> str:
    """r<first>, ... from [registers, threads] uint32."""
    text = f"mad.wide.u32 d20, t, 4, d{array};"
    return text + "".join(
        f"ld.global.b32 r{first + i}, [d20+{4 * threads * i}];" for i in range(registers)
    )


def store(registers: int, first: int, array: int, threads: int) -> str:
    text = f"mad.wide.u32 d20, t, 4, d{array};"
    return text + "".join(
        f"st.global.b32 [d20+{4 * threads * i}], r{first + i};" for i in range(registers)
    )


def name(first: int, count: int) -> str:
    return "{" + ", ".join(f"r{first + i}" for i in range(count)) + "}"


def swizzle(matrix: np.ndarray, descriptor_mode: int, shift: int) -> tuple[np.ndarray, int]:
    """[rows, 16] as rows of 32 bytes from 1024 on, and its descriptor."""
    rows = len(matrix)
    content = np.zeros((rows, 2, 8), BF16)
    for row, chunk in itertools.product(range(rows), range(2)):
        content[row, chunk ^ (row % 8 // 4)] = matrix[row, 8 * chunk : 8 * chunk + 8]
    return content.reshape(-1).view(
        np.uint32
    ), 1024 >> 4 | 256 >> 4 << 32 | descriptor_mode << shift


FILL = """
mov.b64 d10, memory; cvt.u32.u64 r50, d10; mad.lo.u32 r51, t, 4, r50; mad.wide.u32 d20, t, 4, d1;
ld.global.b32 r52, [d20]; st.shared.b32 [r51], r52; fence.proxy.async.shared::cta; bar.sync 0;
"""
"""Shared memory from the second array, one word of each of 128 threads."""


def _place_transposed(matrix: np.ndarray, row_bytes: int) -> tuple[np.ndarray, int, int]:
    """[rows, 16] from byte 1024 on as CUTLASS writes the layout: ((8, m, n), (8, k)).

    Of the rows, 8 stand side by side, m such chunks fill a row of memory, and n of these are the
    leading stride apart; of K, 8 are a row of memory apart and k the other stride. Returns the
    bytes as uint32, and both strides.
    """
    rows, numbers = len(matrix), row_bytes // 2
    lead, stride = 16 * row_bytes, 8 * row_bytes
    content = np.zeros((-(-rows // numbers), 16, row_bytes // 16, 8), BF16)
    for row, k in itertools.product(range(rows), range(16)):
        chunk = row % numbers // 8
        turn = k % 8 // (128 // row_bytes)
        content[row // numbers, k, chunk ^ turn, row % 8] = matrix[row, k]
    return content.reshape(-1).view(np.uint32), lead, stride


def fill(content: np.ndarray) -> str:
    """Shared memory from the first array."""
    return (
        "mov.b64 d10, memory; cvt.u32.u64 r50, d10; mad.lo.u32 r51, t, 4, r50;"
        "mad.wide.u32 d20, t, 4, d0;"
        + "".join(
            f"ld.global.b32 r52, [d20+{512 * i}]; st.shared.b32 [r51+{512 * i}], r52;"
            for i in range(content.size // 128)
        )
        + "fence.proxy.async.shared::cta; bar.sync 0;"
    )


def place_both(a: np.ndarray, b: np.ndarray, row_bytes: int, mode: int) -> tuple:
    """Both in shared memory, one after the other, and their descriptors."""
    (left, *_), (right, lead, stride) = (_place_transposed(m, row_bytes) for m in (a, b))
    facts = lead >> 4 << 16 | stride >> 4 << 32 | mode
    starts = (1024, 1024 + left.nbytes)
    return np.concatenate([left, right]), *(facts | start >> 4 for start in starts)
