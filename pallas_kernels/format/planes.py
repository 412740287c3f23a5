"""One plane of 16-bit words -> q - zero_point in 16-bit floats, without any conversion.

Write a field into the lowest bits of the significand of a power of two: the result is the power
plus the field, in units of the last place. In bfloat16, 0x4300 is 128 with a unit of 1. In float16,
0x6400 is 1024 with a unit of 1, and 0x5400 is 64 with a unit of 1/16, which reads a field four bits
further up without a shift. One addition then subtracts the power and the zero point together. All
of it is exact.

Only 7 bits fit below bfloat16's power. For 8 bits, bit 7 therefore becomes a second number: 128 if
it is set, 256 if not. The difference of the two numbers is the signed integer.

Each form exists twice, as the same function: in plain array operations, which run anywhere, and as
the PTX text that NVIDIA GPUs run, two words (one 32-bit register) at a time.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

_ONE = {"bfloat16": "0x3F803F80", "float16": "0x3C003C00"}
_FMA = {"bfloat16": "fma.rn.bf16x2", "float16": "fma.rn.f16x2"}


@dataclasses.dataclass(frozen=True)
class Plane:
    """How the integers of one plane come out of words that hold u = q + 2^(bits-1).

    Attributes:
      bits: width of u, 4 or 8.
      dtype: name of the 16-bit float dtype.
      shift: right shift of the word before its field is taken.
      field: mask of the field in the shifted word.
      magic: the power of two, as bits of `dtype`.
      lead: the sum of `u - q` and the power, an integer: float(bits) = q + lead.
      asm: PTX from words $1 and addends $2 (both in pairs) to the sum $0.
    """

    bits: int
    dtype: str
    shift: int
    field: int
    magic: int
    lead: int
    asm: str


def describe_plane(bits: int, plane: int, dtype) -> Plane:
    """How to read plane `plane` of words with fields of `bits` bits (4 or 8) into `dtype`."""
    name = jnp.dtype(dtype).name
    if bits == 8:
        return _describe_bytes(plane, name)
    shift, field, magic, power = 4 * plane, 0x000F, 0x4300, 128
    if name == "float16":
        # planes 1 and 3 are read where they stand, so one shift serves two planes
        shift, odd = 8 * (plane // 2), plane % 2
        field, magic, power = (0x00F0, 0x5400, 64) if odd else (0x000F, 0x6400, 1024)
    steps = _shift(shift) + f"lop3.b32 t, t, {_pair(field)}, {_pair(magic)}, 0xEA; "
    return Plane(bits, name, shift, field, magic, power + 8, _finish(steps, "t", name))


def _describe_bytes(plane: int, name: str) -> Plane:
    if name == "float16":
        # the byte and the constant's byte in one instruction, no shift
        steps = f"mov.b32 m, 0x64646464; prmt.b32 t, $1, m, {('0x4240', '0x4341')[plane]}; "
        return Plane(
            8, name, 8 * plane, 0x00FF, 0x6400, 1024 + 128, _finish(steps, "t", name, ", m")
        )
    steps = (
        _shift(8 * plane)
        + "lop3.b32 a, t, 0x007F007F, 0x43004300, 0xEA; "  # (t & 7F) | 4300
        + "lop3.b32 b, t, 0x00800080, 0x43004300, 0xAE; "  # (~t & 80) | 4300
        + "mov.b32 m, 0xBF80BF80; fma.rn.bf16x2 a, b, m, a; "
    )
    return Plane(8, name, 8 * plane, 0x007F, 0x4300, 0, _finish(steps, "a", name, ", a, b, m"))


def _pair(half: int) -> str:
    return f"0x{half:04X}{half:04X}"


def _shift(count: int) -> str:
    return f"shr.u32 t, $1, {count}; " if count else "mov.b32 t, $1; "


def _finish(steps: str, register: str, name: str, more: str = "") -> str:
    """Add $2. As a fused multiply-add by 1, since bfloat16 has no addition before sm_90."""
    return (
        f"{{ .reg .b32 t, one{more}; {steps}mov.b32 one, {_ONE[name]}; "
        f"{_FMA[name]} $0, {register}, one, $2; }}"
    )


def add_plain(words: jax.Array, addend: jax.Array, plane: Plane) -> jax.Array:
    """(q + plane.lead) + addend in `plane.dtype`, from words uint16 of the addend's shape."""
    shifted = words >> plane.shift
    value = _join(shifted & plane.field, plane)
    if plane.bits == 8 and plane.dtype == "bfloat16":
        value = value - _join(~shifted & 0x0080, plane)
    return value + addend


def _join(field: jax.Array, plane: Plane) -> jax.Array:
    return lax.bitcast_convert_type(field | plane.magic, plane.dtype)


def negate_zero(zero_point: jax.Array | None, plane: Plane) -> jax.Array:
    """-(zero_point + plane.lead), the addend, exact in `plane.dtype`; None is a zero point of 0."""
    if zero_point is None:
        return jnp.full((), -plane.lead, plane.dtype)
    return (-plane.lead - zero_point.astype(jnp.float32)).astype(plane.dtype)
