"""Asynchronous products of warpgroups (sm_90a).

Source: PTX ISA, "Asynchronous warpgroup level matrix instructions". Registers that a product
adds to may be touched by nothing but a product of the same shape before the wait, those that it
multiplies may not be written, and `wgmma.fence` must stand between writing either and the product.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.ptx.block import BOOL, LANES, U32, U64, Block
from tests.ptx.faults import Fault, check
from tests.ptx.opcodes.descriptors import WGMMA_SWIZZLES, read_matrix
from tests.ptx.opcodes.fragments import add, find_element, gather_left
from tests.ptx.opcodes.table import opcode
from tests.ptx.parse import Instruction, Literal, Refused, Vector

_GROUP = 4 * LANES
_SEVERAL = -1


@dataclasses.dataclass(frozen=True)
class Product:
    """One on its way: names of its registers, and the shared memory that it reads."""

    summed: tuple[str, ...]
    used: tuple[str, ...]
    reads: tuple


def _declare(columns: int, kind: str) -> None:
    @opcode(f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}")
    def multiply_add(block: Block, instruction: Instruction, active) -> None:
        _expect_all(active)
        target, left, right, keep, *flags = instruction.operands
        turned = _read_flags(flags)
        summed = tuple(item.name for item in target.items)
        used = tuple(item.name for item in left.items) if isinstance(left, Vector) else ()
        _check_registers(block, summed, used)
        matrices, reads = _read_left(block, left, kind, turned)
        rights, more = _read_each(block, right, columns, kind, turned[-1])
        products = matrices @ np.repeat(rights, 4, 0).swapaxes(1, 2)
        _add_up(block, summed, products, block.read(keep, BOOL, None))
        product = Product(summed, used, (*reads, *more))
        block.registers.hold(summed, used)
        block.sums[-1].append(product)


for _kind in ("bf16", "f16"):
    for _columns in range(8, 257, 8):
        _declare(_columns, _kind)


def _expect_all(active) -> None:
    if active is not None:
        raise Refused("wgmma by a part of the block")


def _read_flags(flags: list) -> list[bool]:
    """Whether each factor in shared memory is transposed; none is negated."""
    if flags[:2] != [Literal(1)] * 2:
        raise Refused("wgmma of negated matrices")
    return [flag != Literal(0) for flag in flags[2:]]


def _check_registers(block: Block, summed: tuple, used: tuple) -> None:
    unfenced = block.registers.unfenced & {*summed, *used}
    check(not unfenced, "registers of a wgmma were written after the last wgmma.fence")
    going = [product for group in block.sums for product in group]
    if any(p.summed != summed and {*p.summed} & {*summed} for p in going):
        raise Fault("a wgmma adds to sums of another shape that are not done")


def _read_left(block: Block, operand, kind: str, turned: list[bool]) -> tuple[np.ndarray, tuple]:
    """float64 [warps, 16, 16]: warp w has rows 16 w .. 16 w + 15 of its group's matrix."""
    if isinstance(operand, Vector):
        return gather_left(block, operand, kind, None), ()
    matrices, reads = _read_each(block, operand, 64, kind, turned[0])
    return matrices.reshape(block.warps, 16, 16), reads


def _read_each(
    block: Block, operand, rows: int, kind: str, transposed: bool
) -> tuple[np.ndarray, tuple]:
    """The matrix of each warpgroup, [groups, rows, 16]."""
    descriptors = block.read(operand, U64, None).reshape(-1, _GROUP)
    check(descriptors == descriptors[:, :1], "threads have different descriptors")
    found = [
        read_matrix(block, int(own[0]), rows, kind, WGMMA_SWIZZLES, _SEVERAL, transposed=transposed)
        for own in descriptors
    ]
    return np.stack([matrix for matrix, _ in found]), tuple(token for _, token in found)


def _add_up(block: Block, summed: tuple, products: np.ndarray, keep: np.ndarray) -> None:
    """Registers of sums [warps, 16, columns] take the products, plus themselves where `keep`."""
    for i, name in enumerate(summed):
        row, column = find_element(i)
        mine = products[:, row, column].reshape(-1)
        before = block.registers.peek(name) if keep.any() else np.zeros(block.threads, U32)
        fresh = add(mine, np.zeros(block.threads, U32))
        block.registers.poke(name, np.where(keep, add(mine, before), fresh))


@opcode("wgmma.fence.sync.aligned")
def fence(block: Block, instruction: Instruction, active) -> None:
    """What was written to registers before is what later products see."""
    _expect_all(active)
    block.registers.unfenced.clear()


@opcode("wgmma.commit_group.sync.aligned")
def commit(block: Block, instruction: Instruction, active) -> None:
    """What was begun since the last commit becomes a group."""
    _expect_all(active)
    block.sums.append([])


@opcode("wgmma.wait_group.sync.aligned")
def wait(block: Block, instruction: Instruction, active) -> None:
    """Wait until at most so many groups are on their way."""
    _expect_all(active)
    while len(block.sums) > instruction.operands[0].value + 1:
        for product in block.sums.pop(0):
            block.registers.release(product.summed, product.used)
            for token in product.reads:
                block.shared.end_read(*token)


@opcode("fence.proxy.async.shared::cta", "fence.proxy.async")
def fence_proxy(block: Block, instruction: Instruction, active) -> None:
    """What was written to shared memory before is what the tensor cores see."""
    block.shared.fence(np.unique(block.list_threads(active) // LANES))
