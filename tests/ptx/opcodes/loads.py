"""Loads and stores.

Source: PTX ISA, "Data Movement and Conversion Instructions": `ld`, `st`. The type says how many
bytes move; a wider register is filled with the sign (`s`) or zeros. Vectors of 2 and 4 move at
once, and all of a vector must be aligned to its size. Hints to the caches mean nothing here.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.block import U64, Block
from tests.ptx.opcodes.table import TYPES, opcode
from tests.ptx.parse import Instruction, Refused, Vector

_SIZES = (8, 16, 32, 64)
_KINDS = [
    *(f"{letter}{bits}" for letter in "bus" for bits in _SIZES),
    *(f"v2.b{bits}" for bits in _SIZES),
    *(f"v4.b{bits}" for bits in _SIZES[:3]),
]
_CACHED = ("", ".nc", ".L1::evict_first", ".L1::evict_last", ".L1::no_allocate")
_GLOBAL_LOADS = [f"ld.global{cached}.{kind}" for cached in _CACHED for kind in _KINDS]
_SHARED = ("shared", "shared::cta")


def _list_registers(operand) -> tuple:
    return operand.items if isinstance(operand, Vector) else (operand,)


@opcode("ld.param.b64", "ld.param.u64", "ld.param::entry.b64")
def load_parameter(block: Block, instruction: Instruction, active) -> None:
    """The address of an array."""
    target, source = instruction.operands
    if source.offset:
        raise Refused("a parameter that is no pointer")
    address = block.parameters[source.base.name]
    block.write(target, np.full(block.threads, address, U64), active)


@opcode(*_GLOBAL_LOADS, *(f"ld.{space}.{kind}" for space in _SHARED for kind in _KINDS))
def load(block: Block, instruction: Instruction, active) -> None:
    """Read, and fill the registers."""
    target, source = instruction.operands
    registers, dtype = _list_registers(target), TYPES[instruction.opcode.rpartition(".")[2]]
    size = dtype.itemsize * len(registers)
    addresses = block.find_addresses(source, active)
    if instruction.opcode.startswith("ld.shared"):
        data = block.shared.read(addresses, size, block.list_threads(active))
    else:
        data = block.memory.read(addresses, size)
    columns = np.ascontiguousarray(data.reshape(len(addresses), size).view(dtype).T)
    for register, column in zip(registers, columns, strict=True):
        _fill(block, register, column, active)


def _fill(block: Block, register, values: np.ndarray, active) -> None:
    """Set a register of the active threads to their values."""
    width = block.find_width(register)
    wide = values.astype(f"{values.dtype.kind}{width}").view(f"u{width}")
    if active is not None:
        everywhere = np.zeros(block.threads, wide.dtype)
        everywhere[active] = wide
        wide = everywhere
    block.write(register, wide, active)


@opcode(*(f"st.{space}.{kind}" for space in ("global", *_SHARED) for kind in _KINDS))
def store(block: Block, instruction: Instruction, active) -> None:
    """Write the low bits of the registers."""
    target, source = instruction.operands
    dtype = np.dtype(f"u{TYPES[instruction.opcode.rpartition('.')[2]].itemsize}")
    values = [block.read_low(register, dtype, active) for register in _list_registers(source)]
    threads = block.list_threads(active)
    data = np.stack(values, 1)[threads].view(np.uint8)
    addresses = block.find_addresses(target, active)
    if instruction.opcode.startswith("st.global"):
        block.memory.write(addresses, data)
    else:
        block.shared.write(addresses, data, threads)
