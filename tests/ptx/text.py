"""Evaluate the few PTX instructions that the kernels write by hand, on a machine without a GPU.

Source of the semantics: PTX ISA, chapter "Instructions": "Logic and Shift Instructions" (`lop3`,
`shr`), "Data Movement and Conversion Instructions" (`mov`, `prmt`) and "Half Precision Floating
Point Instructions" (`fma`). What is not known here is refused, never guessed.
"""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np

_HALVES = {"fma.rn.bf16x2": ml_dtypes.bfloat16, "fma.rn.f16x2": np.float16}


def run(asm: str, *arguments: np.ndarray) -> np.ndarray:
    """Run one block of inline PTX.

    Args:
      asm: instructions on `$0` (the result), `$1`, ... (the arguments), declared registers and
        32-bit literals.
      *arguments: uint32 [n], the values of `$1` and following.

    Returns:
      uint32 [n], the value of `$0`.

    Raises:
      ValueError: naming the instruction or operand that is not known.
    """
    lines = [line.strip() for line in asm.strip().removeprefix("{").removesuffix("}").split(";")]
    registers = {f"${i}": a.astype(np.uint32) for i, a in enumerate(arguments, start=1)}
    declared = {"$0"}
    for line in filter(None, lines):
        opcode, _, rest = line.partition(" ")
        names = [name.strip() for name in rest.split(",")]
        if opcode == ".reg":
            kind, first = names[0].split()
            _expect(kind == ".b32", line)
            declared |= {first, *names[1:]}
            continue
        target, *operands = names
        _expect(target in declared, line)
        # the compiler may give the result the register of an argument
        late = "$0" in registers and any(name.startswith("$") for name in operands)
        _expect(not late, line)
        values = [_read(name, registers, line) for name in operands]
        registers[target] = _execute(opcode, values, line)
    return np.broadcast_to(registers["$0"], arguments[0].shape)


def _expect(fine: bool, line: str) -> None:
    if not fine:
        raise ValueError(f"cannot evaluate: {line}")


def _read(name: str, registers: dict[str, np.ndarray], line: str) -> np.ndarray:
    if name in registers:
        return registers[name]
    _expect(re.fullmatch(r"0x[0-9A-Fa-f]{1,8}|0|[1-9]\d{0,8}", name) is not None, line)
    return np.asarray(int(name, 0), np.uint32)


def _execute(opcode: str, values: list[np.ndarray], line: str) -> np.ndarray:
    match opcode, values:
        case "mov.b32", [value]:
            return value
        case "shr.u32", [value, count]:
            _expect(count.ndim == 0 and int(count) < 32, line)
            return value >> count
        case "lop3.b32", [a, b, c, table]:
            _expect(table.ndim == 0 and int(table) < 256, line)
            return _look_up(a, b, c, int(table))
        case "prmt.b32", [a, b, selector]:
            _expect(selector.ndim == 0 and int(selector) < 1 << 16, line)
            return _permute(a, b, int(selector))
        case "fma.rn.bf16x2" | "fma.rn.f16x2", [a, b, c]:
            return _multiply_add(a, b, c, _HALVES[opcode])
    raise ValueError(f"cannot evaluate: {line}")


def _look_up(a, b, c, table: int) -> np.ndarray:
    """Bit i of the result is bit 4a + 2b + c of the table, of the three bits i."""
    result = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            terms = (x if index & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
            result = result | np.bitwise_and.reduce(np.broadcast_arrays(*terms))
    return result


def _permute(a, b, selector: int) -> np.ndarray:
    """Byte i is the byte of {b, a} that nibble i of the selector names, or its sign eight times."""
    a, b = np.broadcast_arrays(a, b)
    pool = [value >> np.uint32(8 * i) & np.uint32(0xFF) for value in (a, b) for i in range(4)]
    result = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        byte = pool[nibble & 7]
        if nibble & 8:
            byte = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        result = result | byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def _multiply_add(a, b, c, dtype) -> np.ndarray:
    """a * b + c in each half, rounded once, to nearest even.

    In float64 a product of two halves is exact. So is the sum, unless exponents are further apart
    than the 53 bits of float64 allow; that is checked, and so is that one rounding leads from
    float64 to the half: numpy's and ml_dtypes' conversions go there directly or by way of float32,
    which must then hold the sum exactly. Infinities and NaN are refused as well.
    """
    halves = []
    for shift in (0, 16):
        x, y, z = (
            (value >> np.uint32(shift)).astype(np.uint16).view(dtype).astype(np.float64)
            for value in np.broadcast_arrays(a, b, c)
        )
        product = x * y
        total = product + z
        if not (np.abs(total) <= float(ml_dtypes.finfo(dtype).max)).all():
            raise ValueError("a sum is infinite, not a number, or too large")
        exact = (total - product == z) & (total - z == product)
        narrow = total.astype(np.float32).astype(np.float64) == total
        if not (exact & narrow).all():
            raise ValueError("a sum is not exact in float32: rounding it twice is not one rounding")
        halves.append(total.astype(np.float32).astype(dtype).view(np.uint16).astype(np.uint32))
    return halves[0] | halves[1] << np.uint32(16)
