"""Floating point numbers.

Source: PTX ISA, chapters "Floating Point Instructions" and "Half Precision Floating Point
Instructions": `add`, `sub`, `mul`, `fma`, `neg`, `abs`, `min`, `max`, `div`, `rcp`, `sqrt`,
`rsqrt`, `ex2`. With `x2` both halves of a register are computed, each by itself (of float32 since
sm_100). What is not `approx`, `full` or `ftz` is rounded once, to nearest even (`.rn`), down
(`.rm`) or towards zero (`.rz`), and keeps subnormal numbers; a NaN is the canonical one.

The approximate ones (`div.full`, `rcp.approx`, `sqrt.approx`, `rsqrt.approx`, `ex2.approx`: at
most 2 units in the last place) have bits that only a GPU knows. Here they are the exact value
rounded once, and the tests' bound holds the difference.
"""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np

from tests.ptx.opcodes.table import TYPES, pure

_CANONICAL = {"f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}
_TINY = 2.0**-126
"""The smallest normal float32."""


def add_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded to odd: rounding it again to at most 51 bits is one rounding.

    Knuth's sum gives what was lost; where something was, the last bit is set, towards the exact
    sum (Boldo and Melquiond, *Emulation of FMA and correctly rounded sums*, 2008).
    """
    total = a + b
    part = total - a
    lost = (a - (total - part)) + (b - part)
    bits = total.view(np.int64)
    even = (bits & 1) == 0
    inexact = (lost != 0) & np.isfinite(total)
    # one unit towards zero, where the exact sum lies there, else the next number outwards
    inwards = (lost < 0) == (total > 0)
    return np.where(inexact & even, np.where(inwards, bits - 1, bits + 1), bits).view(np.float64)


def round_to(value: np.ndarray, kind: str) -> np.ndarray:
    """float64 -> `kind`, rounded once to nearest even."""
    if kind == "bf16":
        return _round_to_bfloat16(value)
    return value.astype(TYPES[kind])


def _round_to_bfloat16(value: np.ndarray) -> np.ndarray:
    """By way of float32 rounded to odd: ml_dtypes would round twice."""
    near = value.astype(np.float32)
    lost = np.where(np.isfinite(near), value - near.astype(np.float64), 0.0)
    bits = near.view(np.int32)
    inwards = (near != 0) & ((lost < 0) == (near > 0))
    odd = np.where(inwards, bits - 1, bits + 1)
    bits = np.where((lost != 0) & ((bits & 1) == 0), odd, bits).astype(np.int32)
    return bits.view(np.float32).astype(ml_dtypes.bfloat16)


def _finish(value: np.ndarray, kind: str) -> np.ndarray:
    """float64 -> bits of `kind`."""
    rounded = round_to(value, kind)
    bits = rounded.view(f"u{rounded.dtype.itemsize}")
    return np.where(np.isnan(value), np.array(_CANONICAL[kind], bits.dtype), bits)


def widen(value: np.ndarray) -> np.ndarray:
    """Any float -> float64, exactly."""
    if value.dtype == ml_dtypes.bfloat16:  # three times as fast as its own conversion
        wide = value.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).astype(np.float64)
    return value.astype(np.float64)


def _declare(name: str, kind: str, count: int, function) -> None:
    """An opcode of `count` operands whose exact result, or one rounded to odd, is in float64."""

    def compute(*values: np.ndarray) -> np.ndarray:
        return _finish(function(*map(widen, values)), kind)

    compute_pairs = _split_pairs(compute, kind)
    chosen = compute_pairs if name.endswith("x2") else compute
    operand = f"b{16 * TYPES[kind].itemsize}" if name.endswith("x2") else kind
    pure(name, operand, *[operand] * count)(_give_signature(chosen, count))


def _split_pairs(compute, kind: str):
    """The same for two numbers in a register of twice the bits."""
    dtype = TYPES[kind]

    def compute_pairs(*values: np.ndarray) -> np.ndarray:
        return compute(*(value.view(dtype) for value in values)).view(values[0].dtype)

    return compute_pairs


def _give_signature(function, count: int):
    return {
        1: lambda a: function(a),
        2: lambda a, b: function(a, b),
        3: lambda a, b, c: function(a, b, c),
    }[count]


def _multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return add_to_odd(a * b, c)


_TWO = {"add": add_to_odd, "sub": lambda a, b: add_to_odd(a, -b), "mul": lambda a, b: a * b}

for _name, _function in _TWO.items():
    for _kind in ("f32", "f16", "bf16"):
        # the rounding is part of the name or left out, with one meaning
        _declare(f"{_name}.rn.{_kind}", _kind, 2, _function)
        _declare(f"{_name}.{_kind}", _kind, 2, _function)
        _declare(f"{_name}.rn.{_kind}x2", _kind, 2, _function)
        _declare(f"{_name}.{_kind}x2", _kind, 2, _function)
for _kind in ("f32", "f16", "bf16", "f32x2", "f16x2", "bf16x2"):
    _declare(f"fma.rn.{_kind}", _kind.removesuffix("x2"), 3, _multiply_add)
for _kind in ("f16", "bf16"):
    # sm_100: halves and a float32, added in float32
    for _name, _sign in (("add", 1), ("sub", -1)):
        pure(f"{_name}.rn.f32.{_kind}", "f32", _kind, "f32")(
            lambda a, b, sign=_sign: _finish(add_to_odd(widen(a), sign * widen(b)), "f32")
        )
    pure(f"fma.rn.f32.{_kind}", "f32", _kind, _kind, "f32")(
        lambda a, b, c: _finish(_multiply_add(widen(a), widen(b), widen(c)), "f32")
    )


@pure("fma.rm.f32", "f32", "f32", "f32", "f32")
def multiply_add_down(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounded down."""
    exact = _multiply_add(widen(a), widen(b), widen(c))
    near = exact.astype(np.float32)
    down = np.nextafter(near, np.float32(-np.inf))
    return _finish(widen(np.where(widen(near) > exact, down, near)), "f32")


@pure("add.rz.f32", "f32", "f32", "f32")
def add_towards_zero(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero."""
    exact = add_to_odd(widen(a), widen(b))
    near = exact.astype(np.float32)
    less = np.nextafter(near, np.float32(0))
    return _finish(widen(np.where(np.abs(widen(near)) > np.abs(exact), less, near)), "f32")


for _kind in ("f32", "f16", "bf16"):
    _uint = f"b{8 * TYPES[_kind].itemsize}"
    _top = 1 << 8 * TYPES[_kind].itemsize - 1
    pure(f"neg.{_kind}", _uint, _uint)(lambda a, top=_top: a ^ a.dtype.type(top))
    pure(f"abs.{_kind}", _uint, _uint)(lambda a, top=_top: a & a.dtype.type(top - 1))
    # numpy's fmin leaves NaN out, its minimum does not
    for _name, _function in (
        ("min", np.fmin),
        ("max", np.fmax),
        ("min.NaN", np.minimum),
        ("max.NaN", np.maximum),
    ):
        # of float32 sm_100 also compares three
        pure(f"{_name}.{_kind}", _kind, _kind, _kind, more=_kind == "f32")(
            lambda *values, kind=_kind, function=_function: _finish(
                functools.reduce(function, map(widen, values)), kind
            )
        )


def _flush(value: np.ndarray) -> np.ndarray:
    """Subnormal numbers of float32 -> 0."""
    return np.where(np.abs(value) < _TINY, np.copysign(0.0, value), value)


_declare("div.rn.f32", "f32", 2, np.divide)
_declare("div.full.f32", "f32", 2, np.divide)
_declare("rcp.rn.f32", "f32", 1, np.reciprocal)
_declare("rcp.approx.ftz.f32", "f32", 1, lambda a: _flush(np.reciprocal(_flush(a))))
_declare("sqrt.rn.f32", "f32", 1, np.sqrt)
_declare("sqrt.approx.f32", "f32", 1, np.sqrt)
_declare("ex2.approx.f32", "f32", 1, np.exp2)
_declare("ex2.approx.ftz.f32", "f32", 1, lambda a: _flush(np.exp2(_flush(a))))
_declare("lg2.approx.ftz.f32", "f32", 1, lambda a: _flush(np.log2(_flush(a))))
_declare("rsqrt.approx.f32", "f32", 1, lambda a: 1 / np.sqrt(a))
_declare("rsqrt.approx.ftz.f32", "f32", 1, lambda a: _flush(1 / np.sqrt(_flush(a))))
