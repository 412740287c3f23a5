"""Tensor memory and the products of sm_100, and the mbarriers that tell when they are done.

Source: PTX ISA, "TensorCore 5th Generation Family Instructions" (`tcgen05`; instruction descriptor
of `.kind::f16`; data path layouts D, for 128 rows, and F, for 64) and "mbarrier". A product of 64
rows has 16 of them in the first (or last) 16 of each 32 lanes. A factor in tensor memory has two
16-bit numbers in a cell, K along the columns.

`tcgen05.fence` is not asked for: XLA's Triton writes none and leaves order to barriers.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.ptx.block import BOOL, LANES, U16, U32, U64, Block
from tests.ptx.faults import check
from tests.ptx.opcodes.descriptors import TCGEN05_SWIZZLES, read_matrix
from tests.ptx.opcodes.floats import widen
from tests.ptx.opcodes.fragments import add
from tests.ptx.opcodes.table import TYPES, opcode
from tests.ptx.parse import Address, Instruction, Refused

_COUNTS = tuple(2**i for i in range(8))
_SHAPES = ("32x32b", "16x32bx2")
_LANE = np.arange(LANES)


def _list_forms(name: str) -> list[str]:
    return [
        f"tcgen05.{name}.sync.aligned.{shape}.x{count}.b32"
        for shape in _SHAPES
        for count in _COUNTS
    ]


def _find_cells(block: Block, instruction: Instruction, address, split, warp: int, active):
    """Lanes [32, 1] and columns [32, n] that the threads of a warp move.

    `.32x32b`: a thread has a lane. `.16x32bx2`: threads 16 to 31 have the same 16 lanes as those
    before them, `split` columns further right.
    """
    start = _find_uniform_address(block, address, warp, active)
    lane, column = start >> 16, start & 0xFFFF
    count = int(instruction.opcode.split(".")[5][1:])
    columns = column + np.arange(count)[None, :]
    if ".32x32b." in instruction.opcode:
        lanes, columns = _LANE, np.broadcast_to(columns, (LANES, count))
    else:
        lanes, columns = _LANE % 16, columns + (_LANE // 16 * split.value)[:, None]
    offset = lane - 32 * (warp % 4)
    fine = offset == 0 or (offset == 16 and ".16x32bx2." in instruction.opcode)
    check(fine, f"warp {warp} reaches for lanes of tensor memory from {lane} on")
    return lane + lanes[:, None], columns


def _find_uniform_address(block: Block, address: Address, warp: int, active) -> int:
    return block.find_uniform(address.base, U32, warp) + address.offset


@opcode(*_list_forms("ld"))
def load(block: Block, instruction: Instruction, active) -> None:
    """Cells -> registers, which hold nothing before `tcgen05.wait::ld`."""
    _expect_all(active)
    target, address, *split = instruction.operands
    found = np.zeros((block.warps, LANES, len(target.items)), U32)
    for warp in range(block.warps):
        cells = _find_cells(block, instruction, address, *(split or [None]), warp, active)
        found[warp] = block.tensor_memory.load(warp, *cells)
    for item, column in zip(target.items, np.moveaxis(found, 2, 0), strict=True):
        block.write(item, np.ascontiguousarray(column).reshape(-1), active)
    block.registers.hold_loaded(item.name for item in target.items)


@opcode(*_list_forms("st"))
def store(block: Block, instruction: Instruction, active) -> None:
    """Registers -> cells, which hold nothing before `tcgen05.wait::st`."""
    address, *split, source = instruction.operands
    values = [block.read(item, U32, active).reshape(-1, LANES) for item in source.items]
    for warp in block.list_warps(active):
        cells = _find_cells(block, instruction, address, *(split or [None]), warp, active)
        data = np.stack([value[warp] for value in values], 1)
        block.tensor_memory.store(warp, *cells, data)


@opcode("tcgen05.wait::ld.sync.aligned")
def wait_for_loads(block: Block, instruction: Instruction, active) -> None:
    _expect_all(active)
    block.registers.release_loaded()
    for warp in range(block.warps):
        block.tensor_memory.end_loads(warp)


@opcode("tcgen05.wait::st.sync.aligned")
def wait_for_stores(block: Block, instruction: Instruction, active) -> None:
    for warp in block.list_warps(active):
        block.tensor_memory.end_stores(warp)


def _expect_all(active) -> None:
    if active is not None:
        raise Refused("tcgen05.ld by a part of the block")


@opcode("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32")
def allocate(block: Block, instruction: Instruction, active) -> None:
    """By one warp, which writes the address to shared memory."""
    address, columns = instruction.operands
    warp = _find_one_warp(block, active)
    start = block.tensor_memory.allocate(block.find_uniform(columns, U32, warp))
    thread = np.array([warp * LANES])
    place = block.find_addresses(address, block.select_warp(warp))[:1]
    block.shared.write(place, np.array([[start]], U32).view(np.uint8), thread)


@opcode("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned")
def stop_allocating(block: Block, instruction: Instruction, active) -> None:
    _find_one_warp(block, active)
    block.tensor_memory.stop_allocating()


@opcode("tcgen05.dealloc.cta_group::1.sync.aligned.b32")
def free(block: Block, instruction: Instruction, active) -> None:
    address, columns = instruction.operands
    warp = _find_one_warp(block, active)
    sizes = (block.find_uniform(operand, U32, warp) for operand in (address, columns))
    block.tensor_memory.free(*sizes)


def _find_one_warp(block: Block, active) -> int:
    warps = block.list_warps(active)
    check(len(warps) == 1, "several warps allocate or free tensor memory")
    return int(warps[0])


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the instruction descriptor says: sums [rows, columns] of products of one type.

    Attributes:
      turned: whether each factor is transposed.
    """

    rows: int
    columns: int
    kind: str
    turned: tuple[bool, bool] = (False, False)

    @classmethod
    def read(cls, descriptor: int) -> Shape:
        """Bits 4 and 5: float32 sums; 7 to 12: types; 15 and 16: transposed; the rest: shape.

        That is in 17 to 22 and 24 to 28. No other bit is known.
        """
        kinds = {0: "f16", 0b001_001: "bf16"}
        rows, columns = (descriptor >> 24 & 31) << 4, (descriptor >> 17 & 63) << 3
        known = 1 << 4 | (descriptor & (0b111111 << 7 | 0b11 << 15 | 63 << 17 | 31 << 24))
        kind = kinds.get(descriptor >> 7 & 63)
        if descriptor != known or kind is None or rows not in (64, 128) or not columns:
            raise Refused(f"instruction descriptor {descriptor:#x}")
        turned = bool(descriptor >> 15 & 1), bool(descriptor >> 16 & 1)
        return cls(rows, columns, kind, turned)

    def find_lanes(self, first: int) -> np.ndarray:
        """[rows, 1]: layout D, or F."""
        row = np.arange(self.rows)
        check(first in ((0, 16) if self.rows == 64 else (0,)), f"rows from lane {first} on")
        return (first + (row if self.rows == 128 else 32 * (row // 16) + row % 16))[:, None]


@opcode("tcgen05.mma.cta_group::1.kind::f16")
def multiply_add(block: Block, instruction: Instruction, active) -> None:
    """Issued by one thread."""
    target, left, right, shape, keep = instruction.operands
    thread, warp = _find_one_thread(block, active)
    shape = Shape.read(int(block.read(shape, U32, active)[thread]))
    sums = _find_region(block, target, active, shape, shape.columns)
    where = (block, active, shape, thread, warp)
    a, tokens = _read_left(left, *where)
    b, token = _read_shared(right, shape.columns, shape.turned[1], *where)
    before = np.zeros((shape.rows, shape.columns), U32)
    if block.read(keep, BOOL, active)[thread]:
        before = block.tensor_memory.read_sum(warp, *sums)
    block.tensor_memory.add(warp, *sums, add(a @ b.T, before))
    for one in (*tokens, token):
        block.shared.hand_to_product(*one, block.tensor_memory.number)


def _find_region(block: Block, address: Address, active, shape: Shape, columns: int):
    """Lanes [rows, 1] and columns [rows, n] of a matrix in tensor memory."""
    [start] = block.find_addresses(address, active)
    lanes = shape.find_lanes(int(start) >> 16)
    return lanes, np.broadcast_to((int(start) & 0xFFFF) + np.arange(columns), (shape.rows, columns))


def _read_left(
    operand, block: Block, active, shape: Shape, thread: int, warp: int
) -> tuple[np.ndarray, tuple]:
    """float64 [rows, 16], from tensor memory or shared memory; tokens of what must stay there."""
    if not isinstance(operand, Address):
        found, token = _read_shared(
            operand, shape.rows, shape.turned[0], block, active, shape, thread, warp
        )
        return found, (token,)
    if shape.turned[0]:
        raise Refused("a transposed factor in tensor memory")
    cells = block.tensor_memory.use(warp, *_find_region(block, operand, active, shape, 8))
    return widen(cells.view(U16).view(TYPES[shape.kind])), ()


def _read_shared(
    operand, rows: int, transposed: bool, block: Block, active, shape: Shape, thread: int, warp: int
) -> tuple[np.ndarray, tuple]:
    descriptor = int(block.read(operand, U64, active)[thread])
    return read_matrix(
        block, descriptor, rows, shape.kind, TCGEN05_SWIZZLES, warp, transposed=transposed
    )


def _find_one_thread(block: Block, active) -> tuple[int, int]:
    threads = block.list_threads(active)
    check(len(threads) == 1, f"{len(threads)} threads execute what one must")
    return int(threads[0]), int(threads[0]) // LANES


@opcode("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64")
def commit(block: Block, instruction: Instruction, active) -> None:
    """The mbarrier is told when all products so far of this thread are done."""
    address = _touch(block, instruction.operands[0], active)
    block.tensor_memory.commit(address, block.barriers.find(address).phase)
    block.barriers.arrive(address)


@opcode("mbarrier.init.shared::cta.b64")
def initialize(block: Block, instruction: Instruction, active) -> None:
    operand, count = instruction.operands
    thread, _ = _find_one_thread(block, active)
    address = _mark(block, operand, active)
    block.barriers.initialize(address, int(block.read(count, U32, active)[thread]))


@opcode("mbarrier.inval.shared::cta.b64")
def invalidate(block: Block, instruction: Instruction, active) -> None:
    block.barriers.invalidate(_mark(block, instruction.operands[0], active))


def _mark(block: Block, operand, active) -> int:
    """Write the 8 bytes of an mbarrier, by one thread; its address."""
    thread, _ = _find_one_thread(block, active)
    place = block.find_addresses(operand, active)
    block.shared.write(place, np.zeros((1, 8), np.uint8), np.array([thread]))
    return int(place[0])


def _touch(block: Block, operand, active) -> int:
    """Read them, by all active threads."""
    places = block.find_addresses(operand, active)
    check(places == places[0], "threads wait for different mbarriers")
    threads = block.list_threads(active)
    block.shared.read(places, 8, threads)
    return int(places[0])


@opcode("mbarrier.try_wait.parity.shared::cta.b64")
def wait_for_phase(block: Block, instruction: Instruction, active) -> np.ndarray | None:
    """Whether the phase of a parity is complete.

    It may answer no at any time, which is why kernels ask in a loop. Here the first answer is
    always no; after that, threads stay until it is yes.
    """
    target, operand, parity = instruction.operands
    address = _touch(block, operand, active)
    threads = block.list_threads(active)
    wanted = block.read(parity, U32, active)[threads]
    check(wanted == wanted[0], "threads wait for different phases")
    warps = np.unique(threads // LANES)
    if block.barriers.is_first_try(address, warps):
        block.write(target, np.zeros(block.threads, BOOL), active)
        return None
    if not block.barriers.is_complete(address, int(wanted[0])):
        return np.isin(np.arange(block.threads), threads)
    phase = block.barriers.find(address).phase - 1
    block.tensor_memory.see(warps, address, phase)
    block.write(target, np.ones(block.threads, BOOL), active)
    return None
