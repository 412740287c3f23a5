"""Asynchronous copies from global to shared memory.

Source: PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy": `cp.async`,
`cp.async.commit_group`, `cp.async.wait_group`, `cp.async.wait_all`. Only a wait by the thread that
copied makes the bytes readable to it, and then a barrier to others. Here the bytes are there at
once, but whoever touches them before the wait commits a fault.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.block import BOOL, LANES, U32, Block
from tests.ptx.opcodes.table import opcode
from tests.ptx.parse import Instruction, Literal, Refused, Register


@opcode("cp.async.cg.shared.global", "cp.async.ca.shared.global")
@opcode("cp.async.cg.shared.global.L2::128B", "cp.async.ca.shared.global.L2::128B")
def copy(block: Block, instruction: Instruction, active) -> None:
    """Copy 4, 8 or 16 bytes, or write zeros where the fourth operand says so."""
    target, source, size, *rest = instruction.operands
    if size not in map(Literal, (4, 8, 16)) or (".cg." in instruction.opcode and size.value != 16):
        raise Refused(instruction.text)
    threads = block.list_threads(active)
    counts = _count_bytes(block, rest, size.value, active)[threads]
    addresses = block.find_addresses(source, active)
    data = block.memory.read_some(addresses, size.value, counts)
    rows = block.shared.start_copy(block.find_addresses(target, active), data, threads)
    warps, starts = np.unique(threads // LANES, return_index=True)
    for warp, *mine in zip(
        warps, np.split(rows, starts[1:]), np.split(threads, starts[1:]), strict=True
    ):
        block.copies[warp][-1].append((size.value, *mine))


def _count_bytes(block: Block, rest: list, size: int, active) -> np.ndarray:
    """How many bytes each thread reads: the fourth operand, or none where that predicate is set."""
    if not rest:
        return np.full(block.threads, size)
    [operand] = rest
    if isinstance(operand, Register) and operand.kind == "pred":
        return np.where(block.read(operand, BOOL, active), 0, size)
    return block.read(operand, U32, active)


@opcode("cp.async.commit_group")
def commit(block: Block, instruction: Instruction, active) -> None:
    """What a warp began since its last commit becomes a group."""
    for warp in block.list_warps(active):
        block.copies[warp].append([])


@opcode("cp.async.wait_group")
def wait(block: Block, instruction: Instruction, active) -> None:
    """Wait until at most so many groups are on their way."""
    _end_groups(block, instruction.operands[0].value, active)


@opcode("cp.async.wait_all")
def wait_for_all(block: Block, instruction: Instruction, active) -> None:
    commit(block, instruction, active)
    _end_groups(block, 0, active)


def _end_groups(block: Block, most: int, active) -> None:
    ended: dict[int, list[tuple]] = {}
    for warp in block.list_warps(active):
        groups = block.copies[warp]
        while len(groups) > most + 1:
            for size, *token in groups.pop(0):
                ended.setdefault(size, []).append(token)
    for size, tokens in ended.items():
        rows, threads = (np.concatenate(arrays) for arrays in zip(*tokens, strict=True))
        block.shared.end_copy(rows, size, threads)
