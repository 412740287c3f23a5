"""One kernel to execute, and what it must give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from tests.executed.bounds import Bounded
from tests.ptx.faults import EarlyRead
from tests.ptx.launch import Launch, compile_launch


@dataclasses.dataclass(frozen=True)
class Work:
    """A function with one kernel.

    Attributes:
      fn: of `arguments`; with `interpret=True` it runs on a CPU.
      arguments: trees of NumPy arrays.
      expected: what each output must be.
      take: of each output (sums of splits not yet added) the rows that mean something.
      settled: whether the data leave no rounding open but the last.
    """

    fn: Callable
    arguments: tuple
    expected: tuple[Bounded | np.ndarray, ...]
    take: Callable[[np.ndarray], np.ndarray]
    settled: bool

    def compile(self, arch: str) -> Launch:
        specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), self.arguments)
        return compile_launch(self.fn, *specs, arch=arch)

    def run(
        self, launch: Launch, blocks: Sequence[int] | None = None
    ) -> tuple[list[np.ndarray], int]:
        """The outputs, and how many steps they took; `blocks` as in `Launch.run`."""
        return launch.run(jax.tree.leaves(self.arguments), blocks)

    def run_noting_early(
        self, launch: Launch, blocks: Sequence[int] | None = None
    ) -> tuple[list[np.ndarray], int, bool]:
        """The same, and whether the kernel reads loads of tensor memory early (`EarlyRead`)."""
        try:
            return *self.run(launch, blocks), False
        except EarlyRead:
            return *self.run(dataclasses.replace(launch, early=True), blocks), True

    def interpret(self) -> list[np.ndarray]:
        """The same outputs by Pallas' own interpreter."""
        run = jax.jit(lambda *arguments: self.fn(*arguments, interpret=True))
        return [np.asarray(output) for output in jax.tree.leaves(run(*self.arguments))]

    def measure(self, outputs: list[np.ndarray]) -> float:
        """The worst error over its bound, 0 where every bit is as it must be.

        Anything above 1 is wrong, and so is infinity.
        """
        pairs = zip(outputs, self.expected, strict=True)
        return max(self._measure_one(self.take(output), right) for output, right in pairs)

    def _measure_one(self, output: np.ndarray, right: Bounded | np.ndarray) -> float:
        if isinstance(right, np.ndarray):
            return 0.0 if np.array_equal(output, right) else np.inf
        if self.settled and not right.is_exactly(output):
            return np.inf
        return right.measure(output)
