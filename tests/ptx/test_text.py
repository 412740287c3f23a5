"""Inline assembly against values worked out by hand from the PTX ISA."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from tests.ptx import run


def _u32(*values: int) -> np.ndarray:
    return np.array(values, np.uint32)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (0x80, lambda a, b, c: a & b & c),
        (0xFE, lambda a, b, c: a | b | c),
        (0x40, lambda a, b, c: a & b & ~c),
        (0x1A, lambda a, b, c: (a & b | c) ^ a),
        (0xEA, lambda a, b, c: (a & b) | c),
        (0xAE, lambda a, b, c: (~a & b) | c),
    ],
)
def test_lop3_looks_every_combination_of_bits_up_in_its_table(table, expected):
    """The first four tables are the examples that the PTX ISA gives."""
    combinations = itertools.product((0, 0xFFFFFFFF), repeat=3)
    a, b, c = (_u32(*column) for column in zip(*combinations, strict=True))
    result = run(f"lop3.b32 $0, $1, $2, $3, {table:#x};", a, b, c)
    np.testing.assert_array_equal(result, expected(a, b, c))


def test_prmt_picks_bytes_and_repeats_signs():
    a, b = _u32(0x83828180), _u32(0x07060504)
    assert run("prmt.b32 $0, $1, $2, 0x7531;", a, b) == 0x07058381
    # the example of CUB's PRMT, NVIDIA's C++ name of it
    assert run("prmt.b32 $0, $1, $2, 0x7531;", _u32(0x03020100), b) == 0x07050301
    assert run("prmt.b32 $0, $1, $2, 0x4240;", a, b) == 0x04820480
    assert run("prmt.b32 $0, $1, $2, 0xC8F9;", a, b) == 0x00FF00FF


def test_shr_fills_with_zeros():
    assert run("{ .reg .b32 t; shr.u32 t, $1, 4; mov.b32 $0, t; }", _u32(0x80000010)) == 0x08000001


@pytest.mark.parametrize(
    ("opcode", "dtype"), [("fma.rn.bf16x2", ml_dtypes.bfloat16), ("fma.rn.f16x2", np.float16)]
)
def test_fma_works_on_each_half_and_rounds_once_to_even(opcode, dtype):
    unit = 2.0 ** -ml_dtypes.finfo(dtype).nmant
    low, high = (1 + unit, 1.0, -1.0), (3.0, 0.5, unit / 4 + unit / 4)

    def join(pair):
        halves = np.array(pair, dtype).view(np.uint16).astype(np.uint32)
        return _u32(int(halves[0] | halves[1] << 16))

    arguments = [join(pair) for pair in zip(low, high, strict=True)]
    [result] = run(f"{opcode} $0, $1, $2, $3;", *arguments)
    halves = np.array([result & 0xFFFF, result >> 16], np.uint16).view(dtype).astype(np.float64)
    # 1.5 and half a unit lies between two values, and the even one is below
    np.testing.assert_array_equal(halves, [unit, 1.5])


@pytest.mark.parametrize(
    ("opcode", "dtype"), [("fma.rn.bf16x2", ml_dtypes.bfloat16), ("fma.rn.f16x2", np.float16)]
)
def test_fma_does_not_round_the_product(opcode, dtype):
    """(1 + u)^2 - (1 + 2u) is u^2; the product rounded by itself would be 1 + 2u, and leave 0."""
    unit = float(ml_dtypes.finfo(dtype).eps)
    a, c, square = (
        int(dtype(value).view(np.uint16)) for value in (1 + unit, -1 - 2 * unit, unit**2)
    )
    assert run(f"{opcode} $0, $1, $1, $2;", _u32(a), _u32(c)) == square


@pytest.mark.parametrize(
    ("a", "b", "tiny", "expected"),
    [(7, 37, -1, 258), (7, 37, 1, 260), (9, 29, -1, 260), (9, 29, 1, 262)],
)
def test_fma_rounds_once_where_float64_cannot_hold_the_sum(a, b, tiny, expected):
    """a b / 256 is half way between two bfloat16, and 2^-130 decides; float64 alone loses it."""
    values = (a, b / 256, tiny * 2.0**-130)
    bits = (int(np.array(v, ml_dtypes.bfloat16).view(np.uint16)) for v in values)
    [result] = run("fma.rn.bf16x2 $0, $1, $2, $3;", *map(_u32, bits))
    assert (np.array([result & 0xFFFF], np.uint16).view(ml_dtypes.bfloat16) == expected / 256).all()


@pytest.mark.parametrize(("c", "expected"), [(0x7C00, 0x7C00), (0x7E01, 0x7FFF), (0x7BFF, 0x7C00)])
def test_fma_of_what_is_not_finite(c, expected):
    """Infinity stays, NaN becomes the canonical one, and what is too large becomes infinite."""
    assert run("fma.rn.f16x2 $0, $1, $2, $3;", _u32(0x7BFF), _u32(0x3C00), _u32(c)) == expected


@pytest.mark.parametrize(
    "asm",
    [
        "vadd.u32 $0, $1, $1;",
        "lop3.b32 t, $1, $1, $1, 0xEA;",
        "mov.b32 $0, t;",
        "mov.b32 $0, %tid;",
        "{ .reg .b128 p; mov.b32 $0, $1; }",
        "shr.u32 $0, $1, 010;",
        "prmt.b32.f4e $0, $1, $1, 0x1;",
        "lop3.b32 $0, $1, $1, $1, 0x1EA;",
        "lop3.b32 $0, $1, $1, 0xEA;",
        "mov.b32 $1, 0x1;",
        "mov.b32 $0, $2;",
        "{ .reg .b32 t; mov.b32 $0, 0x1; mov.b32 t, $1; }",
    ],
)
def test_what_is_not_known_is_refused(asm):
    with pytest.raises(ValueError, match="cannot evaluate"):
        run(asm, _u32(1))
