"""Which threads execute which instruction next.

All threads of a block that stand at one instruction execute it at once. Where they part at a
branch, those at the lowest instruction go first, which brings them together again. `bar.sync`
stops threads until all that have not returned have arrived. An instruction may also let threads
stay: they try it again as soon as some mbarrier has completed a phase.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.block import BOOL, Block
from tests.ptx.faults import Fault
from tests.ptx.opcodes.table import OPCODES
from tests.ptx.parse import Instruction, Literal, Refused

_MOST_STEPS = 50_000_000
_RETURNS = {"ret", "exit"}
_BRANCHES = {"bra", "bra.uni"}
_BARRIERS = {"bar.sync", "barrier.sync"}


def link(code: tuple[Instruction, ...]) -> list:
    """What each instruction does.

    Raises:
      Refused: naming every opcode that is not known.
    """
    special = _RETURNS | _BRANCHES | _BARRIERS
    unknown = {i.opcode for i in code if i.opcode not in OPCODES} - special
    if unknown:
        raise Refused(f"opcodes that are not known: {', '.join(sorted(unknown))}")
    return [OPCODES.get(instruction.opcode) for instruction in code]


class Schedule:
    """The threads of a block on their way through the code."""

    def __init__(self, block: Block, code: tuple[Instruction, ...], actions: list):
        self._block, self._code, self._actions = block, code, actions
        self._place = np.zeros(block.threads, np.int64)
        self._alive = np.ones(block.threads, np.bool_)
        self._waiting = np.zeros(block.threads, np.bool_)
        self._asleep = np.zeros(block.threads, np.bool_)
        self._together: int | None = 0
        """Where all threads stand, None if at several places; then `_place` holds."""
        self.steps = 0

    def run(self, *, returns: bool = True) -> int:
        """Execute until every thread has returned; how many steps it took.

        `returns`: else the end of the code is the end.
        """
        place = 0
        try:
            with np.errstate(all="ignore"):
                while self._alive.any() and (returns or self._together != len(self._code)):
                    place, active = self._choose()
                    self._step(place, active)
                self._block.finish()
        except (Fault, Refused) as error:
            at = f"block {self._block.number}, step {self.steps}, instruction {place}"
            raise type(error)(f"{error}: {self._code[place].text} ({at})") from None
        return self.steps

    def _choose(self) -> tuple[int, np.ndarray | None]:
        """The next instruction, and the threads that execute it: None for all."""
        if self._together is not None:
            return self._together, None
        ready = self._alive & ~self._waiting & ~self._asleep
        if not ready.any():
            ready = self._release()
        place = int(self._place[ready].min())
        active = ready & (self._place == place)
        if active.all():
            self._together = place
            return place, None
        return place, active

    def _release(self) -> np.ndarray:
        if not np.array_equal(self._alive, self._waiting):
            raise Fault("threads wait for each other for ever")
        self._block.pass_barrier()
        self._waiting[:] = False
        return self._alive

    def _step(self, place: int, active: np.ndarray | None) -> None:
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise Fault("no end")
        instruction = self._code[place]
        action = self._actions[place]
        if action is not None:
            stay = self._execute(action, instruction, active)
            self._advance(place, active, stay)
        elif instruction.opcode in _BRANCHES:
            self._branch(place, instruction, active)
        elif instruction.opcode in _BARRIERS:
            self._arrive(place, instruction, active)
        else:
            self._return(instruction, active)

    def _execute(self, action, instruction: Instruction, active: np.ndarray | None):
        if instruction.guard is not None:
            guard = self._block.read(instruction.guard, BOOL, active)
            active = guard if active is None else guard & active
            if active.all():
                active = None
            elif not active.any():
                return None
        return action(self._block, instruction, active)

    def _advance(self, place: int, active, stay: np.ndarray | None) -> None:
        if stay is not None and stay.any():
            self._part(place)
            go = ~stay if active is None else active & ~stay
            self._place[go] = place + 1
            self._asleep |= stay
        elif self._together is not None:
            self._together = place + 1
        else:
            self._place[active] = place + 1
        if self._block.barriers.take_news():
            self._asleep[:] = False

    def _part(self, place: int) -> None:
        if self._together is not None:
            self._place[:] = place
            self._together = None

    def _branch(self, place: int, instruction: Instruction, active) -> None:
        taken = self._find_guard(instruction, active)
        if self._together is not None and taken.all():
            self._together = instruction.target
        elif self._together is not None and not taken.any():
            self._together = place + 1
        else:
            everyone = np.ones(self._block.threads, np.bool_) if active is None else active
            self._part(place)
            self._place[everyone] = place + 1
            self._place[everyone & taken] = instruction.target

    def _arrive(self, place: int, instruction: Instruction, active) -> None:
        if instruction.operands != (Literal(0),) or instruction.guard is not None:
            raise Refused(instruction.text)
        if self._together is not None:
            self._block.pass_barrier()
            self._together = place + 1
        else:
            self._place[active] = place + 1
            self._waiting |= active

    def _return(self, instruction: Instruction, active) -> None:
        taken = self._find_guard(instruction, active)
        self._part(self._together or 0)
        gone = taken if active is None else taken & active
        self._place[(self._alive if active is None else active) & ~gone] += 1
        self._alive &= ~gone

    def _find_guard(self, instruction: Instruction, active) -> np.ndarray:
        if instruction.guard is None:
            return np.ones(self._block.threads, np.bool_)
        return self._block.read(instruction.guard, BOOL, active)
