"""What the threads of a warp do together.

Source: PTX ISA, "Data Movement" (`shfl.sync`), "Parallel Synchronization" (`redux.sync`,
`elect.sync`, `bar.warp.sync`, `vote.sync`). Members must be all 32 threads.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.block import LANES, U32, Block
from tests.ptx.faults import check
from tests.ptx.opcodes.table import opcode
from tests.ptx.parse import Instruction

_LANE = np.arange(LANES)


def _expect_members(block: Block, members, active) -> None:
    block.list_warps(active)
    check(block.read(members, U32, active) == 0xFFFFFFFF, "a warp operation without some threads")


def _read_warps(block: Block, operand, active, dtype=U32) -> np.ndarray:
    """[warps, 32]."""
    return block.read(operand, np.dtype(dtype), active).reshape(-1, LANES)


@opcode(*(f"shfl.sync.{mode}.b32" for mode in ("up", "down", "bfly", "idx")))
def shuffle(block: Block, instruction: Instruction, active) -> None:
    """Read the register of another lane, or the own where that lies outside of the segment."""
    *targets, source, by, clamp, members = instruction.operands
    _expect_members(block, members, active)
    values = _read_warps(block, source, active)
    by, clamp = (_read_warps(block, o, active).astype(np.int64) for o in (by, clamp))
    limit, segment = clamp & 31, clamp >> 8 & 31
    last, first = (_LANE & segment) | (limit & ~segment), _LANE & segment
    mode = instruction.opcode.split(".")[2]
    lane = {
        "up": _LANE - by,
        "down": _LANE + by,
        "bfly": _LANE ^ by,
        "idx": first | (by & ~segment),
    }[mode]
    inside = lane >= last if mode == "up" else lane <= last
    lane = np.where(inside, lane, _LANE)
    block.write(targets[0], np.take_along_axis(values, lane, 1).reshape(-1), active)
    for predicate in targets[1:]:
        block.write(predicate, inside.reshape(-1), active)


@opcode("redux.sync.add.s32", "redux.sync.add.u32")
def add_up(block: Block, instruction: Instruction, active) -> None:
    """The sum over the warp, in every thread of it."""
    target, source, members = instruction.operands
    _expect_members(block, members, active)
    sums = _read_warps(block, source, active).sum(1, dtype=np.uint32)
    block.write(target, np.repeat(sums, LANES), active)


@opcode("redux.sync.max.f32", "redux.sync.min.f32", "redux.sync.max.NaN.f32")
def find_extreme(block: Block, instruction: Instruction, active) -> None:
    """The largest or smallest of the warp, in every thread; without `.NaN`, of those not NaN."""
    target, source, members = instruction.operands
    _expect_members(block, members, active)
    values = _read_warps(block, source, active, np.float32)
    if ".NaN" in instruction.opcode:
        found = np.maximum.reduce(values, 1)
    else:
        found = (np.fmax if ".max" in instruction.opcode else np.fmin).reduce(values, 1)
    bits = np.where(np.isnan(found), U32.type(0x7FFFFFFF), found.view(U32))
    block.write(target, np.repeat(bits, LANES), active)


@opcode(*(f"redux.sync.{name}.{kind}" for name in ("min", "max") for kind in ("s32", "u32")))
def find_extreme_integer(block: Block, instruction: Instruction, active) -> None:
    """The least or the largest of the warp, in every thread of it."""
    target, source, members = instruction.operands
    _expect_members(block, members, active)
    *_, name, kind = instruction.opcode.split(".")
    values = _read_warps(block, source, active, np.int32 if kind == "s32" else np.uint32)
    found = values.min(1) if name == "min" else values.max(1)
    block.write(target, np.repeat(found.view(U32), LANES), active)


@opcode("elect.sync")
def elect(block: Block, instruction: Instruction, active) -> None:
    """Choose one thread of the warp; which, the ISA leaves open. Here it is the first."""
    target, predicate, members = instruction.operands
    _expect_members(block, members, active)
    block.write(target, np.zeros(block.threads, U32), active)
    block.write(predicate, np.tile(_LANE == 0, block.warps), active)


@opcode("bar.warp.sync")
def meet(block: Block, instruction: Instruction, active) -> None:
    """Nothing: threads of a warp run in step here."""
    _expect_members(block, instruction.operands[0], active)
