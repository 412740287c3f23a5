"""A kernel, and what it makes of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tests.ptx.block import Block
from tests.ptx.memory import Global, Part
from tests.ptx.parse import Refused, parse
from tests.ptx.schedule import Schedule, link


class Kernel:
    """PTX of one kernel, ready to run.

    Attributes:
      steps: how many instructions all runs took, each for all threads that met at it.
    """

    def __init__(self, text: str, threads: int, shared_bytes: int, *, early: bool = False):
        """`threads` of a block and `shared_bytes` of its launch.

        `early`: let an `EarlyRead` pass.

        Raises:
          Refused: naming what is not known.
        """
        self._program = parse(text)
        if self._program.threads != threads:
            raise Refused(f"{threads} threads, the kernel has {self._program.threads}")
        self._actions = link(self._program.code)
        self._shared_bytes, self._early = shared_bytes, early
        self.steps = 0

    def run(
        self,
        inputs: Sequence[Part],
        outputs: Sequence[Part],
        blocks: Sequence[int],
        updated: Mapping[int, int] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Run some blocks, one after the other.

        Args:
          inputs: what the first parameters point to; nobody may write there.
          outputs: what the others point to; their numbers are what stands there before.
          blocks: numbers along the one axis of the grid.
          updated: outputs that are inputs updated in place, and which inputs.

        Returns:
          Each output as it is then, and uint8 [bytes] of it: whether they were written.

        Raises:
          Fault: where the kernel does what it must not.
        """
        memory = Global(inputs, outputs, updated)
        names = self._program.parameters
        if len(names) != len(inputs) + len(outputs):
            raise Refused(f"{len(inputs) + len(outputs)} arrays for {len(names)} parameters")
        block = Block(self._program, memory, self._shared_bytes, early=self._early)
        block.parameters = {name: memory.find(i) for i, name in enumerate(names)}
        for number in blocks:
            block.start(number)
            memory.start(number)
            self.steps += Schedule(block, self._program.code, self._actions).run()
        return [memory.fetch(len(inputs) + i) for i in range(len(outputs))]
