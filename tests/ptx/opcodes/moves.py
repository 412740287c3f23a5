"""Copies, conversions and comparisons of registers.

Source: PTX ISA, chapters "Comparison and Selection Instructions" (`setp`, `selp`), "Data Movement
and Conversion Instructions" (`mov`, `cvt`, `cvta`) and "Type Conversion" (which registers may be
wider than the type of an instruction).
"""

from __future__ import annotations

import numpy as np

from tests.ptx.block import BOOL, U16, U32, U64, Block
from tests.ptx.faults import Fault
from tests.ptx.opcodes.floats import round_to, widen
from tests.ptx.opcodes.table import TYPES, opcode, pure
from tests.ptx.parse import Instruction, Refused, Register, Symbol, Vector

_FLOATS = ("f32", "f16", "bf16")


@opcode(*(f"mov.{letter}{bits}" for letter in "bus" for bits in (16, 32, 64)), "mov.f32")
@opcode("mov.pred")
def move(block: Block, instruction: Instruction, active) -> None:
    """Copy bits; a vector on one side takes a register apart or puts one together.

    Compilers put a value and nothing together where they need the value alone.
    """
    target, source = instruction.operands
    kind = instruction.opcode.split(".")[1]
    dtype = BOOL if kind == "pred" else np.dtype(f"u{int(kind[1:]) // 8}")
    if isinstance(target, Vector):
        part = np.dtype(f"u{dtype.itemsize // len(target.items)}")
        dropped = _find_bytes([item == Symbol("_") for item in target.items], part)
        parts = block.read(source, dtype, active, dropped).view(part).reshape(block.threads, -1)
        for item, column in zip(target.items, parts.T, strict=True):
            block.write(item, np.ascontiguousarray(column), active)
    elif isinstance(source, Vector):
        part = np.dtype(f"u{dtype.itemsize // len(source.items)}")
        empty = [isinstance(i, Register) and block.registers.is_empty(i.name) for i in source.items]
        parts = [
            np.zeros(block.threads, part) if is_empty else block.read(item, part, active)
            for item, is_empty in zip(source.items, empty, strict=True)
        ]
        value = np.stack(parts, 1).view(dtype).reshape(-1)
        block.write(target, value, active, _find_bytes(empty, part))
    else:
        block.write(target, block.read(source, dtype, active), active)


def _find_bytes(chosen: list[bool], part: np.dtype) -> frozenset[int]:
    """The bytes of the chosen ones among parts of a register."""
    size = part.itemsize
    return frozenset(
        size * i + byte for i, this in enumerate(chosen) if this for byte in range(size)
    )


@opcode("cvta.to.global.u64", "cvta.to.shared.u64", "cvta.shared.u64")
def convert_address(block: Block, instruction: Instruction, active) -> None:
    """Nothing: an address of global or shared memory is the same in every space here."""
    target, source = instruction.operands
    block.write(target, block.read(source, U64, active), active)


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_COMBINE = {"": None, "and.": np.logical_and, "or.": np.logical_or, "xor.": np.logical_xor}


def _compare_floats(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """With a NaN, what ends in u is true and all else false."""
    nan = np.isnan(widen(a)) | np.isnan(widen(b))
    if name in ("num", "nan"):
        return nan == (name == "nan")
    plain = _COMPARE[name.removesuffix("u")](widen(a), widen(b))
    return np.where(nan, name.endswith("u"), plain)


def _declare_comparison(name: str, kind: str, combine: str) -> None:
    def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return _compare_floats(name, a, b) if kind in _FLOATS else _COMPARE[name](a, b)

    opcode_name = f"setp.{name}.{combine}{kind}"
    if not combine:
        pure(opcode_name, "pred", kind, kind)(compare)
    else:
        pure(opcode_name, "pred", kind, kind, "pred")(
            lambda a, b, c: _COMBINE[combine](compare(a, b), c)
        )


for _combine in _COMBINE:
    for _bits in (16, 32, 64):
        for _letter, _names in (("b", ("eq", "ne")), ("u", _COMPARE), ("s", _COMPARE)):
            for _name in _names:
                _declare_comparison(_name, f"{_letter}{_bits}", _combine)
    for _kind in _FLOATS:
        for _name in (*_COMPARE, *(f"{name}u" for name in _COMPARE), "num", "nan"):
            _declare_comparison(_name, _kind, _combine)

for _bits in (16, 32, 64):
    for _letter in "bus":
        _kind = f"{_letter}{_bits}"
        pure(f"selp.{_kind}", _kind, _kind, _kind, "pred")(lambda a, b, p: np.where(p, a, b))
pure("selp.f32", "b32", "b32", "b32", "pred")(lambda a, b, p: np.where(p, a, b))


def _write_wide(block: Block, target, value: np.ndarray, active) -> None:
    """Set a register that may be wider: the sign or zeros fill it."""
    width = block.find_width(target)
    if width > value.dtype.itemsize and value.dtype.kind in "iu":
        value = value.astype(f"{value.dtype.kind}{width}")
    block.write(target, value.view(f"u{value.dtype.itemsize}"), active)


def _declare_conversion(name: str, source_kind: str, convert) -> None:
    @opcode(name)
    def act(block: Block, instruction: Instruction, active) -> None:
        target, source = instruction.operands
        value = block.read_low(source, TYPES[source_kind], active)
        _write_wide(block, target, convert(value), active)


_INTEGERS = [f"{letter}{bits}" for letter in "us" for bits in (8, 16, 32, 64)]
for _to in _INTEGERS:
    for _from in _INTEGERS:
        _declare_conversion(f"cvt.{_to}.{_from}", _from, lambda v, to=_to: v.astype(TYPES[to]))
    if _to[1:] != "64":
        for _kind in _FLOATS:
            _declare_conversion(
                f"cvt.rn.{_kind}.{_to}", _to, lambda v, kind=_kind: round_to(widen(v), kind)
            )
for _kind in ("f16", "bf16"):
    _declare_conversion(f"cvt.f32.{_kind}", _kind, lambda v: widen(v).astype(np.float32))
    _declare_conversion(f"cvt.rn.{_kind}.f32", "f32", lambda v, k=_kind: round_to(widen(v), k))


def _truncate(value: np.ndarray) -> np.ndarray:
    """Towards zero, NaN to 0, too large ones to the end of the range."""
    whole = np.trunc(np.where(np.isnan(value), 0, widen(value)))
    return np.clip(whole, -(2.0**31), 2.0**31 - 1).astype(np.int32)


_declare_conversion("cvt.rzi.s32.f32", "f32", _truncate)
_declare_conversion(
    "cvt.sat.f32.f32",
    "f32",
    lambda v: np.where(np.isnan(v), np.float32(0), np.clip(v, np.float32(0), np.float32(1))),
)


def _convert_pair(high: np.ndarray, low: np.ndarray, kind: str) -> np.ndarray:
    """Two float32 -> two halves, the first one in the upper bits."""
    halves = [round_to(widen(value), kind).view(U16).astype(U32) for value in (high, low)]
    return halves[0] << np.uint32(16) | halves[1]


for _kind in ("f16", "bf16"):
    pure(f"cvt.rn.{_kind}x2.f32", "b32", "f32", "f32")(
        lambda high, low, kind=_kind: _convert_pair(high, low, kind)
    )


@opcode("griddepcontrol.wait", "griddepcontrol.launch_dependents")
def wait_for_grid(block: Block, instruction: Instruction, active) -> None:
    """Nothing: the kernels before have ended."""
    if instruction.operands:
        raise Refused(instruction.text)


@opcode("trap")
def stop(block: Block, instruction: Instruction, active) -> None:
    raise Fault("a trap")
