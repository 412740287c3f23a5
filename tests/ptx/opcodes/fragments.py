"""Matrices spread over the registers of a warp.

Source: PTX ISA, "Warp-level matrix instructions": `ldmatrix`, `stmatrix`, and `mma.sync` with its
figures of which lane holds which element (m16n8k16: lane 4g + t has rows g and g + 8, and pairs of
columns from 2t on).

Products of two halves are exact in float64, and so nearly are the sums of 16 of them. Adding to a
float32 sum is one rounding here; tensor cores cut off bits, each in its own way (docs/numerics.md).
"""

from __future__ import annotations

import numpy as np

from tests.ptx.block import LANES, U16, U32, Block
from tests.ptx.opcodes.floats import widen
from tests.ptx.opcodes.table import TYPES, opcode
from tests.ptx.parse import Instruction

_LANE = np.arange(LANES)
_GROUP, _PAIR = _LANE // 4, 2 * (_LANE % 4)


def _list_forms(name: str) -> list[str]:
    return [
        f"{name}.sync.aligned.m8n8.x{count}{trans}.shared{cta}.b16"
        for count in (1, 2, 4)
        for trans in ("", ".trans")
        for cta in ("", "::cta")
    ]


def _count_matrices(instruction: Instruction) -> int:
    return int(instruction.opcode.split(".")[4][1:])


@opcode(*_list_forms("ldmatrix"))
def load_matrices(block: Block, instruction: Instruction, active) -> None:
    """8 x 8 matrices of 16 bits: lanes 8i .. 8i + 7 give the rows of matrix i."""
    target, source = instruction.operands
    count, warps = _count_matrices(instruction), block.list_warps(active)
    addresses, threads = _find_rows(block, source, count, warps)
    rows = block.shared.read(addresses, 16, threads)
    matrices = rows.view(U16).reshape(len(warps), count, 8, 8)
    if ".trans" in instruction.opcode:
        matrices = matrices.swapaxes(2, 3)
    pairs = np.ascontiguousarray(matrices).reshape(len(warps), count, 64).view(U32)
    for i, register in enumerate(target.items):
        value = np.zeros((block.warps, LANES), U32)
        value[warps] = pairs[:, i]
        block.write(register, value.reshape(-1), active)


@opcode(*_list_forms("stmatrix"))
def store_matrices(block: Block, instruction: Instruction, active) -> None:
    """The same the other way round."""
    target, source = instruction.operands
    count, warps = _count_matrices(instruction), block.list_warps(active)
    values = [block.read(item, U32, active).reshape(-1, LANES)[warps] for item in source.items]
    matrices = np.stack(values, 1).view(U16).reshape(len(warps), count, 8, 8)
    if ".trans" in instruction.opcode:
        matrices = matrices.swapaxes(2, 3)
    addresses, threads = _find_rows(block, target, count, warps)
    data = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)
    block.shared.write(addresses, data, threads)


def _find_rows(block: Block, operand, count: int, warps: np.ndarray):
    """Addresses of the rows of matrices, and the threads that give them."""
    everywhere = np.zeros((block.warps, LANES), np.bool_)
    everywhere[warps, : 8 * count] = True
    threads = np.flatnonzero(everywhere)
    return block.find_addresses(operand, everywhere.reshape(-1)), threads


def _map_left() -> np.ndarray:
    """Element [row, column] of 16 x 16 -> its place among [4 registers, 32 lanes, 2 halves]."""
    places = np.zeros((16, 16), np.intp)
    for register in range(4):
        row, column = _GROUP + 8 * (register & 1), _PAIR + 8 * (register >> 1)
        for half in range(2):
            places[row, column + half] = 64 * register + 2 * _LANE + half
    return places


def _map_right() -> np.ndarray:
    """Element [k, column] of 16 x 8 -> its place among [2 registers, 32 lanes, 2 halves]."""
    places = np.zeros((16, 8), np.intp)
    for register in range(2):
        for half in range(2):
            places[_PAIR + 8 * register + half, _GROUP] = 64 * register + 2 * _LANE + half
    return places


_LEFT, _RIGHT = _map_left(), _map_right()


def gather(block: Block, operand, places: np.ndarray, kind: str, active) -> np.ndarray:
    """The matrix of each warp, float64 [warps, ...], from a vector of 32-bit registers."""
    values = [block.read(item, U32, active).reshape(-1, LANES) for item in operand.items]
    halves = np.stack(values, 1).view(U16).reshape(block.warps, -1)
    return widen(halves[:, places].view(TYPES[kind]))


def gather_left(block: Block, operand, kind: str, active) -> np.ndarray:
    """float64 [warps, 16, 16]."""
    return gather(block, operand, _LEFT, kind, active)


def find_element(register: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column, of each lane, that a register of a float32 result 16 x 8n holds."""
    number, rest = divmod(register, 4)
    return _GROUP + 8 * (rest >> 1), 8 * number + _PAIR + (rest & 1)


def add(products: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """float64 + float32 -> float32, bits."""
    return (products + sums.view(np.float32)).astype(np.float32).view(U32)


def _declare_mma(kind: str) -> None:
    @opcode(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32")
    def multiply_add(block: Block, instruction: Instruction, active) -> None:
        block.list_warps(active)
        target, left, right, start = instruction.operands
        products = gather_left(block, left, kind, active) @ gather(
            block, right, _RIGHT, kind, active
        )
        sums = [block.read(item, U32, active) for item in start.items]
        for i, (register, before) in enumerate(zip(target.items, sums, strict=True)):
            row, column = find_element(i)
            block.write(register, add(products[:, row, column].reshape(-1), before), active)


_declare_mma("bf16")
_declare_mma("f16")
