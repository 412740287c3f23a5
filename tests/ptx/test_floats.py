"""Floating point against exact fractions, and against all numbers of 16 bits side by side."""

from __future__ import annotations

import fractions
import math

import ml_dtypes
import numpy as np
import pytest

from tests.ptx.programs import apply

_TYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32}
_FORMATS = {"f16": (11, -24, 15), "bf16": (8, -133, 127), "f32": (24, -149, 127)}
"""Bits of a significand, exponent of the smallest number, exponent of the largest."""
_EVERY = np.arange(1 << 16, dtype=np.uint16)
_SOME = [0x0000, 0x8000, 0x0001, 0x3C00, 0x3F80, 0xBC01, 0x3555, 0x7BFF, 0x0400, 0xC2F7, 0x4300]


def _round(value: fractions.Fraction, kind: str) -> float:
    """To nearest even, in integers alone."""
    precision, least, most = _FORMATS[kind]
    if not value:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < fractions.Fraction(2) ** exponent
    unit = fractions.Fraction(2) ** max(exponent - precision + 1, least)
    whole, rest = divmod(size, unit)
    whole += rest * 2 > unit or (rest * 2 == unit and whole % 2)
    if whole * unit >= fractions.Fraction(2) ** (most + 1):
        return math.copysign(math.inf, value)
    return math.copysign(float(whole * unit), value)


def _nearest(exact: np.ndarray, dtype) -> np.ndarray:
    """The closest of all numbers of a 16-bit type, bits; of two the even one."""
    bits = np.arange(0x7C01 if dtype == np.float16 else 0x7F81, dtype=np.uint16)
    table = bits.view(dtype).astype(np.float64)
    table[-1] = 2 * table[-2] - table[-3]  # where infinity begins to be closer
    place = np.clip(np.searchsorted(table, np.abs(exact)), 1, table.size - 1)
    below, above = np.abs(exact) - table[place - 1], table[place] - np.abs(exact)
    up = (above < below) | ((above == below) & (place % 2 == 0))
    up |= np.abs(exact) > table[-1]
    chosen = np.where(up, place, place - 1).astype(np.uint16)
    return chosen | np.where(np.signbit(exact), 0x8000, 0).astype(np.uint16)


def _widen(bits: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of NaN that signal
        return bits.view(_TYPES[kind]).astype(np.float64)


def _is_number(bits: np.ndarray, kind: str) -> np.ndarray:
    return np.isfinite(_widen(bits, kind))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_all_numbers_with_some_round_to_the_nearest(name, kind):
    """65536 times 11 pairs; sums that float64 cannot hold are left to the next test."""
    a, b = (v.reshape(-1) for v in np.meshgrid(_EVERY, np.array(_SOME, np.uint16)))
    keep = _is_number(a, kind) & _is_number(b, kind)
    a, b = a[keep], b[keep]
    x, y = (_widen(v, kind) for v in (a, b))
    exact = {"add": x + y, "sub": x - y, "mul": x * y}[name]
    if name != "mul":
        y = -y if name == "sub" else y
        held = (exact - x == y) & (exact - y == x)
        a, b, exact = a[held], b[held], exact[held]
    found = apply(f"{name}.rn.{kind} $0, $1, $2;", a, b, result=np.uint16)
    right = _nearest(exact, _TYPES[kind])
    # a zero from numbers that are not zero has the sign of either rule
    np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_sums_and_products_are_rounded_once(kind):
    """Random bits, and operands that leave the sum a hair beside the middle of two numbers."""
    rng = np.random.default_rng(1)
    uint = np.uint32 if kind == "f32" else np.uint16
    a, b, c = (rng.integers(0, 1 << 8 * uint().itemsize, 700).astype(uint) for _ in range(3))
    keep = np.logical_and.reduce([_is_number(v, kind) for v in (a, b, c)])
    a, b, c = a[keep], b[keep], c[keep]
    one = int(np.array(1, _TYPES[kind]).view(uint))
    c[::2], b[::4] = 1 + 0x8000 * (c[::2] % 2), one + 3
    a[::4] = one + a[::4] % 64
    x, y, z = ([fractions.Fraction(float(v)) for v in w.view(_TYPES[kind])] for w in (a, b, c))
    for name, values in (
        (f"fma.rn.{kind} $0, $1, $2, $3", [i * j + k for i, j, k in zip(x, y, z, strict=True)]),
        (f"add.rn.{kind} $0, $1, $3", [i + k for i, k in zip(x, z, strict=True)]),
        (f"sub.rn.{kind} $0, $1, $3", [i - k for i, k in zip(x, z, strict=True)]),
        (f"mul.rn.{kind} $0, $1, $2", [i * j for i, j in zip(x, y, strict=True)]),
    ):
        found = apply(f"{name};", a, b, c, result=uint).view(_TYPES[kind]).astype(np.float64)
        np.testing.assert_array_equal(found, [_round(value, kind) for value in values])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_numbers_of_16_bits_widen_exactly(kind):
    """By the definition of the format: (-1)^s * 1.f * 2^e, exhaustively."""
    found = apply(f"cvt.f32.{kind} $0, $1;", _EVERY, result=np.float32)
    digits, bias = (10, 15) if kind == "f16" else (7, 127)
    sign = np.where(_EVERY >> 15, -1.0, 1.0)
    exponent = (_EVERY >> digits & ((1 << 15 - digits) - 1)).astype(int)
    fraction = (_EVERY & ((1 << digits) - 1)) / (1 << digits)
    value = np.where(
        exponent > 0,
        sign * np.ldexp(1 + fraction, exponent - bias),
        sign * np.ldexp(fraction, 1 - bias),
    )
    finite = exponent < (1 << 15 - digits) - 1
    np.testing.assert_array_equal(found[finite], value[finite])
    assert np.isnan(found[~finite & (fraction > 0)]).all()
    assert (found[~finite & (fraction == 0)] == np.array([np.inf, -np.inf])).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_float32_narrows_to_the_nearest(kind):
    """Around each number of 16 bits: it, the middle to the next, and a hair beside both."""
    numbers = _EVERY[_is_number(_EVERY, kind)].view(_TYPES[kind]).astype(np.float32)
    middles = numbers[:-1] / 2 + numbers[1:] / 2
    middles = middles[np.isfinite(middles)]
    near = np.concatenate([numbers, middles, np.nextafter(middles, 0), np.nextafter(middles, 9e9)])
    near = near[: near.size - near.size % 32].astype(np.float32)
    right = _nearest(near.astype(np.float64), _TYPES[kind])
    found = apply(f"cvt.rn.{kind}.f32 $0, $1;", near, result=np.uint16)
    np.testing.assert_array_equal(found, right)
    pair = apply(f"cvt.rn.{kind}x2.f32 $0, $1, $2;", near, near[::-1].copy(), result=np.uint32)
    np.testing.assert_array_equal(pair >> 16, right)
    np.testing.assert_array_equal(pair & 0xFFFF, right[::-1])


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("source", ["s16", "u16", "s8"])
def test_all_integers_of_16_bits_become_the_nearest_float(source, kind):
    found = apply(
        f"cvt.rn.{kind}.{source} $0, $1;", _EVERY, result=f"u{np.dtype(_TYPES[kind]).itemsize}"
    )
    values = {
        "s16": _EVERY.view(np.int16),
        "u16": _EVERY,
        "s8": (_EVERY & 255).astype(np.uint8).view(np.int8),
    }[source].astype(np.float64)
    right = (
        values.astype(np.float32).view(np.uint32)
        if kind == "f32"
        else _nearest(values, _TYPES[kind])
    )
    np.testing.assert_array_equal(found, right)


def test_conversion_to_integers_truncates():
    values = np.array([1.9, -1.9, 0.0, 3e9, -3e9, np.nan, 2.0**30 + 128], np.float32)
    found = apply("cvt.rzi.s32.f32 $0, $1;", values, result=np.int32)
    np.testing.assert_array_equal(found, [1, -1, 0, 2**31 - 1, -(2**31), 0, 2**30 + 128])


def test_saturation_ends_at_one_and_makes_nan_zero():
    values = np.array([-1, 0.25, 7, np.nan, -np.inf, np.inf], np.float32)
    found = apply("cvt.sat.f32.f32 $0, $1;", values, result=np.float32)
    np.testing.assert_array_equal(found, [0, 0.25, 1, 0, 0, 1])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_signs_change_in_every_number_and_nan(kind):
    np.testing.assert_array_equal(
        apply(f"neg.{kind} $0, $1;", _EVERY, result=np.uint16), _EVERY ^ 0x8000
    )
    np.testing.assert_array_equal(
        apply(f"abs.{kind} $0, $1;", _EVERY, result=np.uint16), _EVERY & 0x7FFF
    )


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_comparisons_of_all_numbers_with_some_and_with_nan(kind):
    b = np.array([*_SOME, 0x7FFF, 0x7C00, 0xFF80], np.uint16)
    a, b = (v.reshape(-1) for v in np.meshgrid(_EVERY[::7], b))
    x, y = (_widen(v, kind) for v in (a, b))
    nan = np.isnan(x) | np.isnan(y)
    for name, right in (("lt", x < y), ("ge", x >= y), ("eq", x == y), ("ne", (x != y) & ~nan)):
        found = apply(f"setp.{name}.{kind} $0, $1, $2;", a, b, result=bool)
        np.testing.assert_array_equal(found, right)
        found = apply(f"setp.{name}u.{kind} $0, $1, $2;", a, b, result=bool)
        np.testing.assert_array_equal(found, right | nan)
    np.testing.assert_array_equal(apply(f"setp.nan.{kind} $0, $1, $2;", a, b, result=bool), nan)


def test_only_the_form_with_nan_hands_it_on():
    a = np.array([np.nan, 1, -2, 5], np.float32)
    b = np.array([3, np.nan, 4, -6], np.float32)
    for name, right in (
        ("min", [3, 1, -2, -6]),
        ("max", [3, 1, 4, 5]),
        ("min.NaN", [np.nan, np.nan, -2, -6]),
        ("max.NaN", [np.nan, np.nan, 4, 5]),
    ):
        found = apply(f"{name}.f32 $0, $1, $2;", a, b, result=np.float32)
        np.testing.assert_array_equal(found, right)


def test_the_largest_of_three_is_that_of_any_pair_and_the_third():
    values = np.array([np.nan, 1, -2, 5, -0.5], np.float32)
    a, b, c = (v.reshape(-1) for v in np.meshgrid(values, values, values))
    for name, choose in (("min", min), ("max", max)):
        found = apply(f"{name}.f32 $0, $1, $2, $3;", a, b, c, result=np.float32)
        strict = apply(f"{name}.NaN.f32 $0, $1, $2, $3;", a, b, c, result=np.float32)
        for three, got, got_strict in zip(zip(a, b, c, strict=True), found, strict, strict=True):
            numbers = [x for x in three if x == x]
            np.testing.assert_equal(got, choose(numbers) if numbers else np.nan)
            np.testing.assert_equal(got_strict, choose(three) if len(numbers) == 3 else np.nan)


def test_each_thread_of_a_warp_gets_its_largest_or_smallest():
    """The third warp has a NaN, the last nothing else."""
    values = np.random.default_rng(5).standard_normal((4, 32)).astype(np.float32)
    values[2, 7], values[3] = np.nan, np.nan
    for name, right in (
        ("max", [*values[:2].max(1), np.delete(values[2], 7).max(), np.nan]),
        ("min", [*values[:2].min(1), np.delete(values[2], 7).min(), np.nan]),
        ("max.NaN", [*values[:2].max(1), np.nan, np.nan]),
    ):
        found = apply(f"redux.sync.{name}.f32 $0, $1, -1;", values, result=np.float32)
        np.testing.assert_array_equal(found.reshape(4, 32), np.repeat(right, 32).reshape(4, 32))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_pairs_of_float32_are_computed_each_by_itself(name):
    rng = np.random.default_rng(4)
    a, b, c = (rng.standard_normal((300, 2)).astype(np.float32) for _ in range(3))
    operands = (a, b, c) if name == "fma" else (a, b)
    pairs = [x.view(np.uint64).reshape(-1) for x in operands]
    text = ", ".join(f"${i}" for i in range(len(pairs) + 1))
    found = apply(f"{name}.rn.f32x2 {text};", *pairs, result=np.uint64)
    x, y, z = ([fractions.Fraction(float(v)) for v in w.reshape(-1)] for w in (a, b, c))
    right = {
        "add": [i + j for i, j in zip(x, y, strict=True)],
        "sub": [i - j for i, j in zip(x, y, strict=True)],
        "mul": [i * j for i, j in zip(x, y, strict=True)],
        "fma": [i * j + k for i, j, k in zip(x, y, z, strict=True)],
    }[name]
    np.testing.assert_array_equal(found.view(np.float32), [_round(v, "f32") for v in right])


def test_a_reciprocal_root_keeps_small_numbers_unless_it_flushes_them():
    values = np.array([2.0**-140, 0.25, 3.0, 2.0**100, np.inf], np.float32)
    found = apply("rsqrt.approx.f32 $0, $1;", values, result=np.float32)
    np.testing.assert_allclose(found, [2.0**70, 2, 3**-0.5, 2.0**-50, 0], rtol=2**-22)
    flushed = apply("rsqrt.approx.ftz.f32 $0, $1;", values[:2], result=np.float32)
    np.testing.assert_array_equal(flushed, [np.inf, 2])


def test_approximate_square_roots_are_near():
    values = np.array([0, 2, 3, 2.0**-140, 2.0**100, np.inf], np.float32)
    found = apply("sqrt.approx.f32 $0, $1;", values, result=np.float32)
    np.testing.assert_allclose(found, [math.sqrt(v) for v in values], rtol=2**-22)


def test_rounding_down_never_goes_above():
    """fma.rm: the largest float32 that is not above the exact value."""
    rng = np.random.default_rng(2)
    a, b, c = (rng.standard_normal(500).astype(np.float32) for _ in range(3))
    found = apply("fma.rm.f32 $0, $1, $2, $3;", a, b, c, result=np.float32)
    for x, y, z, got in zip(a, b, c, found, strict=True):
        exact = fractions.Fraction(float(x)) * fractions.Fraction(float(y)) + fractions.Fraction(
            float(z)
        )
        above = np.nextafter(got, np.float32(np.inf))
        assert fractions.Fraction(float(got)) <= exact < fractions.Fraction(float(above))


def test_rounding_towards_zero_never_goes_outwards():
    """add.rz: the largest float32 in magnitude that is not beyond the exact sum."""
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal(500).astype(np.float32) for _ in range(2))
    b[::2] *= np.float32(1e-6)
    found = apply("add.rz.f32 $0, $1, $2;", a, b, result=np.float32)
    for x, y, got in zip(a, b, found, strict=True):
        exact = abs(fractions.Fraction(float(x)) + fractions.Fraction(float(y)))
        beyond = np.nextafter(np.abs(got), np.float32(np.inf))
        assert fractions.Fraction(float(abs(got))) <= exact < fractions.Fraction(float(beyond))
        assert np.sign(got) == np.sign(np.float64(x) + np.float64(y))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_wide_sums_of_halves_are_of_float32(kind):
    rng = np.random.default_rng(3)
    half = rng.standard_normal(400).astype(_TYPES[kind]).view(np.uint16)
    wide = (rng.standard_normal(400) * 1e-3).astype(np.float32)
    for name, sign in (("add", 1), ("sub", -1)):
        found = apply(f"{name}.rn.f32.{kind} $0, $1, $2;", half, wide, result=np.float32)
        right = [
            _round(fractions.Fraction(float(h)) + sign * fractions.Fraction(float(w)), "f32")
            for h, w in zip(half.view(_TYPES[kind]), wide, strict=True)
        ]
        np.testing.assert_array_equal(found, right)


def test_approximations_flush_what_is_below_the_smallest_normal_number():
    values = np.array([-127.0, -126.0, 0.5, 3.0], np.float32)
    found = apply("ex2.approx.ftz.f32 $0, $1;", values, result=np.float32)
    np.testing.assert_allclose(found, [0, 2.0**-126, math.sqrt(2), 8], rtol=2**-22)
