"""Integers and bits.

Source: PTX ISA, chapters "Integer Arithmetic Instructions" (`add`, `sub`, `mul`, `mad`, `div`,
`rem`, `neg`, `abs`, `min`, `max`, `bfe`, `bfi`), "Logic and Shift Instructions" (`and`, `or`,
`xor`, `not`, `shl`, `shr`, `shf`, `lop3`) and "Data Movement" (`prmt`). Results wrap around.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.faults import check
from tests.ptx.opcodes.table import TYPES, opcode, pure

for _kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
    pure(f"add.{_kind}", _kind, _kind, _kind)(lambda a, b: a + b)
    pure(f"sub.{_kind}", _kind, _kind, _kind)(lambda a, b: a - b)
    pure(f"mul.lo.{_kind}", _kind, _kind, _kind)(lambda a, b: a * b)
    pure(f"mad.lo.{_kind}", _kind, _kind, _kind, _kind)(lambda a, b, c: a * b + c)
    pure(f"min.{_kind}", _kind, _kind, _kind)(np.minimum)
    pure(f"max.{_kind}", _kind, _kind, _kind)(np.maximum)

# a negative result becomes 0
pure("min.relu.s32", "s32", "s32", "s32")(lambda a, b: np.maximum(np.minimum(a, b), 0))
pure("max.relu.s32", "s32", "s32", "s32")(lambda a, b: np.maximum(np.maximum(a, b), 0))

for _kind in ("s16", "s32", "s64"):
    pure(f"neg.{_kind}", _kind, _kind)(lambda a: -a)
    pure(f"abs.{_kind}", _kind, _kind)(np.abs)

for _kind, _wide in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")):
    _dtype, _bits = TYPES[_wide], 8 * TYPES[_kind].itemsize
    pure(f"mul.wide.{_kind}", _wide, _kind, _kind)(
        lambda a, b, wide=_dtype: a.astype(wide) * b.astype(wide)
    )
    pure(f"mad.wide.{_kind}", _wide, _kind, _kind, _wide)(
        lambda a, b, c, wide=_dtype: a.astype(wide) * b.astype(wide) + c
    )
    pure(f"mul.hi.{_kind}", _kind, _kind, _kind)(
        lambda a, b, wide=_dtype, bits=_bits: (a.astype(wide) * b.astype(wide) >> bits).astype(
            a.dtype
        )
    )


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; numpy rounds down."""
    check(b != 0, "division by zero")
    quotient = a // b
    return quotient + ((a % b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)


for _kind in ("s32", "u32", "s64", "u64"):
    pure(f"div.{_kind}", _kind, _kind, _kind)(_divide)
    pure(f"rem.{_kind}", _kind, _kind, _kind)(lambda a, b: a - _divide(a, b) * b)

for _kind in ("pred", "b16", "b32", "b64"):
    pure(f"and.{_kind}", _kind, _kind, _kind)(lambda a, b: a & b)
    pure(f"or.{_kind}", _kind, _kind, _kind)(lambda a, b: a | b)
    pure(f"xor.{_kind}", _kind, _kind, _kind)(lambda a, b: a ^ b)
    pure(f"not.{_kind}", _kind, _kind)(lambda a: ~a)


def _shift_left(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Counts above the width leave nothing."""
    bits = 8 * a.dtype.itemsize
    kept = a << np.minimum(count, bits - 1).astype(a.dtype)
    return np.where(count < bits, kept, np.zeros_like(a))


def _shift_right(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Counts above the width leave nothing, or the sign."""
    bits = 8 * a.dtype.itemsize
    kept = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return kept if a.dtype.kind == "i" else np.where(count < bits, kept, np.zeros_like(a))


for _bits in (16, 32, 64):
    pure(f"shl.b{_bits}", f"b{_bits}", f"b{_bits}", "u32")(_shift_left)
    for _letter in "bus":
        pure(f"shr.{_letter}{_bits}", f"b{_bits}", f"{_letter}{_bits}", "u32")(_shift_right)


@pure("shf.l.wrap.b32", "b32", "b32", "b32", "u32")
def shift_funnel_left(low: np.ndarray, high: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The upper half of {high, low} << count % 32."""
    both = high.astype(np.uint64) << np.uint64(32) | low
    return (both << (count & 31) >> np.uint64(32)).astype(np.uint32)


@pure("shf.r.wrap.b32", "b32", "b32", "b32", "u32")
def shift_funnel_right(low: np.ndarray, high: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The lower half of {high, low} >> count % 32."""
    both = high.astype(np.uint64) << np.uint64(32) | low
    return (both >> (count & 31)).astype(np.uint32)


def _extract(a: np.ndarray, place: np.ndarray, length: np.ndarray) -> np.ndarray:
    """`length` bits from bit `place` on, filled up with zeros or with the sign.

    Past the end of `a` a signed field goes on with the sign of `a`. Place and length are taken
    modulo 256.
    """
    bits = 8 * a.dtype.itemsize
    place, length = place & 0xFF, np.minimum(length & 0xFF, bits)
    field = _shift_right(a, place)
    free = (bits - length).astype(np.uint32)
    return _shift_right(_shift_left(field, free), free) & np.where(length, -1, 0).astype(a.dtype)


for _kind in ("u32", "s32", "u64", "s64"):
    pure(f"bfe.{_kind}", _kind, _kind, "u32", "u32")(_extract)


def _insert(a: np.ndarray, b: np.ndarray, place: np.ndarray, length: np.ndarray) -> np.ndarray:
    """b, with the lowest `length` bits of a from bit `place` on."""
    place, length = place & 0xFF, length & 0xFF
    ones = np.full_like(a, -1 % (1 << 8 * a.dtype.itemsize))
    mask = _shift_left(~_shift_left(ones, length), place)
    return (b & ~mask) | (_shift_left(a, place) & mask)


for _kind in ("b32", "b64"):
    pure(f"bfi.{_kind}", _kind, _kind, _kind, "u32", "u32")(_insert)


@pure("lop3.b32", "b32", "b32", "b32", "b32", "u32")
def look_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bit i of the result is bit 4a + 2b + c of the table, of the three bits i."""
    check((table == table[0]) & (table < 256), "a table of more than 8 bits")
    result = np.zeros_like(a)
    for index in range(8):
        if int(table[0]) >> index & 1:
            terms = [x if index & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
            result = result | (terms[0] & terms[1] & terms[2])
    return result


@pure("prmt.b32", "b32", "b32", "b32", "u32")
def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Byte i is the byte of {b, a} that nibble i of the selector names, or its sign eight times."""
    pool = np.stack([a, b], 1).view(np.uint8)
    nibbles = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
    chosen = np.take_along_axis(pool, (nibbles & 7).astype(np.intp), 1)
    signs = np.where(chosen & 0x80, 0xFF, 0).astype(np.uint8)
    return np.where(nibbles & 8, signs, chosen).reshape(-1).view(np.uint32)


@opcode("popc.b32")
def count_ones(block, instruction, active) -> None:
    """How many bits are set."""
    target, source = instruction.operands
    value = block.read(source, np.dtype(np.uint32), active)
    block.write(target, np.bitwise_count(value).astype(np.uint32), active)
