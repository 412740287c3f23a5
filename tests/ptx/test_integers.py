"""Integers and bits against Python's own integers, which have no width."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.ptx.programs import apply

_EDGES = {
    bits: sorted(
        {
            v % (1 << bits)
            for e in (0, 1, 5, 7, 8, bits - 1, bits)
            for v in (1 << e, -(1 << e), (1 << e) - 1)
        }
    )
    for bits in (16, 32, 64)
}


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def _draw(bits: int, count: int) -> list[np.ndarray]:
    """All pairs or triples of edges and of some random values."""
    rng = np.random.default_rng(bits)
    values = [*_EDGES[bits], *rng.integers(0, 1 << 63, 8, np.uint64).tolist()]
    grid = list(itertools.product([int(v) % (1 << bits) for v in values], repeat=min(count, 2)))
    columns = [np.array(column, f"u{bits // 8}") for column in zip(*grid, strict=True)]
    return columns + [rng.permutation(columns[0])] * (count - len(columns))


def _check(name: str, bits: int, count: int, formula, *, signed: bool, out: int | None = None):
    """`formula` of Python integers, wrapped to `out` bits."""
    out = out or bits
    operands = _draw(bits, count)
    places = ", ".join(f"${i}" for i in range(count + 1))
    found = apply(f"{name} {places};", *operands, result=f"u{out // 8}")
    rows = zip(*(map(int, a) for a in operands), strict=True)
    convert = (lambda v: _signed(v, bits)) if signed else int
    right = [formula(*map(convert, row)) % (1 << out) for row in rows]
    np.testing.assert_array_equal(found, np.array(right, f"u{out // 8}"), err_msg=name)


@pytest.mark.parametrize("letter", "us")
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_arithmetic_wraps_around(bits, letter):
    signed, kind = letter == "s", f"{letter}{bits}"
    for name, count, formula in (
        ("add", 2, lambda a, b: a + b),
        ("sub", 2, lambda a, b: a - b),
        ("mul.lo", 2, lambda a, b: a * b),
        ("mad.lo", 3, lambda a, b, c: a * b + c),
        ("min", 2, min),
        ("max", 2, max),
    ):
        _check(f"{name}.{kind}", bits, count, formula, signed=signed)
    if bits < 64:
        _check(f"mul.wide.{kind}", bits, 2, lambda a, b: a * b, signed=signed, out=2 * bits)
        _check(f"mul.hi.{kind}", bits, 2, lambda a, b: a * b >> bits, signed=signed)
    if kind == "s32":
        _check("min.relu.s32", 32, 2, lambda a, b: max(0, min(a, b)), signed=True)
        _check("max.relu.s32", 32, 2, lambda a, b: max(0, a, b), signed=True)
    if signed:
        _check(f"neg.{kind}", bits, 1, lambda a: -a, signed=True)
        _check(f"abs.{kind}", bits, 1, abs, signed=True)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_by_the_width_or_more_leave_nothing_or_the_sign(bits):
    values = np.repeat(np.array(_EDGES[bits], f"u{bits // 8}"), 7)
    counts = np.tile(
        np.array([0, 1, 4, bits - 1, bits, bits + 3, 2**32 - 1], np.uint32), len(_EDGES[bits])
    )
    for name, formula in (
        ("shl.b", lambda a, c: a << min(c, bits)),
        ("shr.u", lambda a, c: a >> min(c, bits)),
        ("shr.s", lambda a, c: _signed(a, bits) >> min(c, bits)),
    ):
        found = apply(f"{name}{bits} $0, $1, $2;", values, counts, result=values.dtype)
        right = [formula(int(a), int(c)) % (1 << bits) for a, c in zip(values, counts, strict=True)]
        np.testing.assert_array_equal(found, np.array(right, values.dtype))


@pytest.mark.parametrize("bits", [32, 64])
def test_logic_works_bit_by_bit(bits):
    for name, formula in (
        ("and", lambda a, b: a & b),
        ("or", lambda a, b: a | b),
        ("xor", lambda a, b: a ^ b),
    ):
        _check(f"{name}.b{bits}", bits, 2, formula, signed=False)
    _check(f"not.b{bits}", bits, 1, lambda a: ~a, signed=False)


@pytest.mark.parametrize("name", ["div", "rem"])
@pytest.mark.parametrize("letter", "us")
def test_division_goes_towards_zero(name, letter):
    a, b = (column[_draw(32, 2)[1] != 0] for column in _draw(32, 2))
    found = apply(f"{name}.{letter}32 $0, $1, $2;", a, b, result=np.uint32)
    right = []
    for x, y in zip(map(int, a), map(int, b), strict=True):
        if letter == "s":
            x, y = _signed(x, 32), _signed(y, 32)
        quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        right.append((quotient if name == "div" else x - quotient * y) % (1 << 32))
    np.testing.assert_array_equal(found, np.array(right, np.uint32))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_fields_are_extracted_bit_by_bit(kind):
    """The pseudocode of the PTX ISA: past the end, a signed field repeats the sign."""
    bits = int(kind[1:])
    values = np.array(_EDGES[bits], f"u{bits // 8}")
    for place, length in itertools.product((0, 1, 6, bits - 1, bits + 1), (0, 1, 5, bits, 200)):
        found = apply(f"bfe.{kind} $0, $1, {place}, {length};", values, result=values.dtype)
        for value, got in zip(map(int, values), map(int, found), strict=True):
            last = min(place + length - 1, bits - 1)
            sign = value >> last & 1 if kind[0] == "s" and length else 0
            field = [
                value >> place + i & 1 if i < length and place + i < bits else sign
                for i in range(bits)
            ]
            assert got == sum(bit << i for i, bit in enumerate(field)), (value, place, length)


@pytest.mark.parametrize("bits", [32, 64])
def test_fields_are_inserted_bit_by_bit(bits):
    a, b = _draw(bits, 2)
    for place, length in ((0, 0), (0, 8), (4, 14), (bits - 2, 5), (bits, 3), (0, bits)):
        found = apply(f"bfi.b{bits} $0, $1, $2, {place}, {length};", a, b, result=a.dtype)
        mask = ((1 << length) - 1) << place & (1 << bits) - 1
        right = [
            y & ~mask | x << place & mask for x, y in zip(map(int, a), map(int, b), strict=True)
        ]
        np.testing.assert_array_equal(found, np.array(right, a.dtype))


def test_funnel_shifts_take_a_window_of_two_words():
    low, high = _draw(32, 2)
    for count in (0, 1, 17, 31, 32, 45):
        left = apply(f"shf.l.wrap.b32 $0, $1, $2, {count};", low, high, result=np.uint32)
        right = apply(f"shf.r.wrap.b32 $0, $1, $2, {count};", low, high, result=np.uint32)
        both = [int(h) << 32 | int(w) for w, h in zip(low, high, strict=True)]
        window = count % 32
        np.testing.assert_array_equal(left, [(v << window >> 32) % 2**32 for v in both])
        np.testing.assert_array_equal(right, [(v >> window) % 2**32 for v in both])


def test_integers_of_16_bits_convert_with_their_sign_exhaustively():
    every = np.arange(1 << 16, dtype=np.uint16)
    for name, bits, formula in (
        ("cvt.s64.s16", 64, lambda v: _signed(v, 16)),
        ("cvt.u32.u16", 32, int),
        ("cvt.s32.s16", 32, lambda v: _signed(v, 16)),
        ("cvt.s16.s8", 16, lambda v: _signed(v & 255, 8)),
        ("cvt.u16.u8", 16, lambda v: v & 255),
        ("cvt.s32.s8", 32, lambda v: _signed(v & 255, 8)),
    ):
        found = apply(f"{name} $0, $1;", every, result=f"u{bits // 8}")
        right = [formula(int(v)) % (1 << bits) for v in every]
        np.testing.assert_array_equal(found, np.array(right, f"u{bits // 8}"))


def test_a_conversion_into_a_wider_register_fills_it_with_the_sign():
    """`cvt.s8.s32` leaves a number of 8 bits in a register of 32."""
    found = apply("cvt.s8.s32 $0, $1;", np.array([0x1FF, 0x17F], np.uint32), result=np.uint32)
    np.testing.assert_array_equal(found, [0xFFFFFFFF, 0x7F])


@pytest.mark.parametrize("letter", "us")
def test_comparisons_know_signs(letter):
    a, b = _draw(32, 2)
    x, y = (column.view(f"{'i' if letter == 's' else 'u'}4") for column in (a, b))
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        found = apply(f"setp.{name}.{letter}32 $0, $1, $2;", a, b, result=bool)
        right = [getattr(int(v), f"__{name}__")(int(w)) for v, w in zip(x, y, strict=True)]
        np.testing.assert_array_equal(found, right)
    third = np.arange(a.size) % 2 == 0
    found = apply(f"setp.lt.and.{letter}32 $0, $1, $2, $3;", a, b, third, result=bool)
    np.testing.assert_array_equal(found, (x < y) & third)


def test_registers_come_apart_and_together_low_part_first():
    values = np.array([0x44332211, 0x80017FFE], np.uint32)
    body = "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $1; mov.b32 $0, {hi, lo}; }"
    np.testing.assert_array_equal(apply(body, values, result=np.uint32), [0x22114433, 0x7FFE8001])


@pytest.mark.parametrize("kind", ["s32", "u32"])
@pytest.mark.parametrize("choose", [min, max])
def test_each_thread_of_a_warp_gets_its_least_or_largest_integer(kind, choose):
    values = np.random.default_rng(6).integers(0, 1 << 32, (4, 32), np.uint32)
    values[0, 5], values[1, 7], values[2] = 1 << 31, (1 << 31) - 1, values[2] >> 1
    found = apply(f"redux.sync.{choose.__name__}.{kind} $0, $1, -1;", values, result=np.uint32)
    numbers = [[_signed(int(v), 32) if kind == "s32" else int(v) for v in row] for row in values]
    right = np.repeat([choose(row) % (1 << 32) for row in numbers], 32)
    np.testing.assert_array_equal(found.reshape(-1), right)
