"""One block of threads: its registers, its memory, and the values of operands."""

from __future__ import annotations

import numpy as np

from tests.ptx.barriers import Barriers
from tests.ptx.faults import Fault, check
from tests.ptx.memory import SHARED_BASE, Global, Shared
from tests.ptx.parse import Address, Literal, Negated, Program, Refused, Register, Symbol
from tests.ptx.registers import Registers
from tests.ptx.tensor_memory import TensorMemory

BOOL, U8, U16, U32, U64 = (np.dtype(name) for name in ("?", "u1", "u2", "u4", "u8"))
LANES = 32


class Block:
    """The state of one block.

    Attributes:
      threads, warps: how many.
      number: `%ctaid.x`.
      copies: of each warp, groups of asynchronous copies that were not waited for, the open one
        last.
      sums: groups of `wgmma` in the same way, of the whole block.
    """

    def __init__(self, program: Program, memory: Global, shared_bytes: int, *, early: bool = False):
        """`shared_bytes`: what the launch adds to the variables of the program.

        `early`: see `tests.ptx.faults.EarlyRead`; it is a fault otherwise.
        """
        self._early = early
        self.threads = program.threads
        check(self.threads % LANES == 0, "warps that are not full")
        self.warps = self.threads // LANES
        self.memory = memory
        self._program = program
        self._index = np.arange(self.threads, dtype=U32)
        self._symbols, self._shared_end = _place_variables(program, shared_bytes)
        self._constants: dict[tuple, np.ndarray] = {}
        self.parameters: dict[str, int] = {}
        self.start(0)

    def start(self, number: int) -> None:
        """Forget everything but global memory, and become block `number`."""
        self.number = number
        self.registers = Registers(self._program.registers, self.threads, early=self._early)
        warps = self._index // LANES
        seen = np.zeros(self.warps, np.int32)
        self.shared = Shared(self._shared_end, warps, seen)
        self.tensor_memory = TensorMemory(seen)
        self.barriers = Barriers()
        self.copies: list[list[list[tuple]]] = [[[]] for _ in range(self.warps)]
        self.sums: list[list] = [[]]
        self._specials = {
            "%tid.x": self._index,
            "%laneid": self._index % LANES,
            "%ntid.x": self._fill(self.threads, U32),
            "%ctaid.x": self._fill(number, U32),
            **dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"), self._fill(0, U32)),
        }

    def read(
        self,
        operand,
        dtype: np.dtype,
        active: np.ndarray | None,
        dropped: frozenset[int] = frozenset(),
    ) -> np.ndarray:
        """The values [threads] of an operand that has exactly the width of `dtype`.

        The bytes `dropped` are not used, and need no value.
        """
        value = self._read_bits(operand, dtype, active, dropped)
        if value.dtype != dtype:
            if value.dtype.itemsize != dtype.itemsize or dtype == BOOL:
                raise Refused(f"{operand} read as {dtype}")
            value = value.view(dtype)
        return value

    def read_low(self, operand, dtype: np.dtype, active: np.ndarray | None) -> np.ndarray:
        """The same of an operand that may be wider: its low bits."""
        value = self._read_bits(operand, dtype, active)
        if value.dtype.itemsize > dtype.itemsize:
            value = value.astype(f"u{dtype.itemsize}")
        if value.dtype.itemsize != dtype.itemsize:
            raise Refused(f"{operand} read as {dtype}")
        return value.view(dtype)

    def write(
        self,
        operand,
        value: np.ndarray,
        active: np.ndarray | None,
        gaps: frozenset[int] = frozenset(),
    ) -> None:
        """Set a register (or nothing, if it is `_`) in the active threads, but for bytes `gaps`."""
        if isinstance(operand, Register):
            self.registers.write(operand.name, value, active, gaps)
        elif operand != Symbol("_"):
            raise Refused(f"{operand} written")

    def find_width(self, operand) -> int:
        """Bytes of a register."""
        return self.registers.raw[operand.name].itemsize

    def find_addresses(self, operand: Address, active: np.ndarray | None) -> np.ndarray:
        """Of the active threads, uint64."""
        base = operand.base
        width = self.registers.raw[base.name] if isinstance(base, Register) else U64
        value = self.read(base, width, active)
        if active is not None:
            value = value[active]
        return value.astype(np.int64) + operand.offset

    def find_uniform(self, operand, dtype: np.dtype, warp: int) -> int:
        """The one value that all threads of a warp have."""
        value = self.read(operand, dtype, self.select_warp(warp))
        mine = value[warp * LANES : (warp + 1) * LANES]
        check(mine == mine[0], f"threads of warp {warp} have different {operand}")
        return int(mine[0])

    def select_warp(self, warp: int) -> np.ndarray:
        return self._index // LANES == warp

    def list_threads(self, active: np.ndarray | None) -> np.ndarray:
        """The numbers of the active threads."""
        return self._index if active is None else np.flatnonzero(active)

    def list_warps(self, active: np.ndarray | None) -> np.ndarray:
        """The warps that execute an instruction which needs all of their threads."""
        if active is None:
            return np.arange(self.warps)
        some, whole = active.reshape(-1, LANES).any(1), active.reshape(-1, LANES).all(1)
        check(some == whole, "an instruction of a whole warp is executed by a part of it")
        return np.flatnonzero(whole)

    def pass_barrier(self) -> None:
        """Every thread has arrived."""
        self.shared.epoch += 1
        self.tensor_memory.pass_barrier()

    def finish(self) -> None:
        """Every thread has returned."""
        if self.shared.is_busy() or any(map(any, self.copies)):
            raise Fault("a copy was never waited for")
        if any(self.sums):
            raise Fault("a wgmma was never waited for")
        self.tensor_memory.finish()

    def _read_bits(
        self,
        operand,
        dtype: np.dtype,
        active: np.ndarray | None,
        dropped: frozenset[int] = frozenset(),
    ) -> np.ndarray:
        if isinstance(operand, Register):
            return self.registers.read(operand.name, active, dropped)
        if isinstance(operand, Literal):
            return self._fill(operand.value, dtype)
        if isinstance(operand, Negated):
            return ~self.registers.read(operand.register.name, active)
        if isinstance(operand, Symbol) and operand.name in self._specials:
            return self._specials[operand.name]
        if isinstance(operand, Symbol) and operand.name in self._symbols:
            return self._fill(self._symbols[operand.name], dtype)
        raise Refused(f"operand {operand}")

    def _fill(self, value: int, dtype: np.dtype) -> np.ndarray:
        """A constant in all threads; made once, since arrays of values are never changed."""
        if (value, dtype) not in self._constants:
            self._constants[value, dtype] = np.repeat(make_constant(value, dtype), self.threads)
        return self._constants[value, dtype]


def make_constant(value: int, dtype: np.dtype) -> np.ndarray:
    """A literal, whose bits those of a negative or a float number may be."""
    if dtype == BOOL:
        return np.array([value != 0])
    bits = 8 * dtype.itemsize
    if not -(1 << bits - 1) <= value < 1 << bits:
        raise Refused(f"{value} in {bits} bits")
    return np.array([value % (1 << bits)], f"u{dtype.itemsize}").view(dtype)


def _place_variables(program: Program, shared_bytes: int) -> tuple[dict[str, int], int]:
    """Addresses of the variables in shared memory, and its end."""
    at, symbols = SHARED_BASE, {}
    for variable in program.variables:
        if variable.space == "shared" and variable.size:
            at += -at % variable.align
            symbols[variable.name] = at
            at += variable.size
    at += -at % 16
    for variable in program.variables:
        if variable.space == "shared" and not variable.size:
            symbols[variable.name] = at
    return symbols, at + shared_bytes
