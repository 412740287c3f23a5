"""A compiled function with one kernel of Pallas: its PTX, and how XLA launches it.

XLA writes the launch into its dump: `*thunk_sequence.txt` has grid, threads and shared bytes, the
optimized HLO which arguments are the operands, in which order.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests import gpu_aot
from tests.ptx.kernel import Kernel
from tests.ptx.memory import Part

_DTYPES = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "s32": np.dtype(np.int32),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
      text: PTX of the kernel.
      threads: of a block.
      shared_bytes: of a block.
      grid: how many blocks.
      operands: which of the function's arguments, flattened, the kernel reads, in its order.
      outputs: dtype (as XLA names it) and shape of what it writes, after these.
      early: let the kernel read loads of tensor memory before their wait.
      updated: pairs of an output and the operand whose memory it is updated in.
    """

    text: str
    threads: int
    shared_bytes: int
    grid: int
    operands: tuple[int, ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    early: bool = False
    updated: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_dict(cls, facts: dict) -> Launch:
        """The inverse of `dataclasses.asdict`, also after JSON."""
        outputs = tuple((dtype, tuple(shape)) for dtype, shape in facts["outputs"])
        operands, updated = tuple(facts["operands"]), tuple(map(tuple, facts["updated"]))
        return cls(**{**facts, "operands": operands, "outputs": outputs, "updated": updated})

    def run(
        self, arguments: Sequence[np.ndarray], blocks: Sequence[int] | None = None
    ) -> tuple[list[np.ndarray], int]:
        """Execute the kernel.

        Args:
          arguments: all of the function, flattened.
          blocks: of the grid, None for all.

        Returns:
          The outputs, in which what was not written is NaN or -77, and how many steps it took.
        """
        inputs = [Part(np.asarray(arguments[number])) for number in self.operands]
        outputs = [Part(self.make_output(i)) for i in range(len(self.outputs))]
        kernel = self.load()
        chosen = range(self.grid) if blocks is None else blocks
        found = kernel.run(inputs, outputs, chosen, dict(self.updated))
        return [array for array, _ in found], kernel.steps

    def load(self) -> Kernel:
        return Kernel(self.text, self.threads, self.shared_bytes, early=self.early)

    def make_output(self, number: int) -> np.ndarray:
        """An output before the launch."""
        name, shape = self.outputs[number]
        dtype = _DTYPES[name]
        return np.full(shape, -77 if dtype.kind == "i" else np.nan, dtype)


def compile_launch(fn: Callable, *specs: Any, arch: str) -> Launch:
    """Compile a function for `arch` (see `tests.gpu_aot`) and read its one launch."""
    with tempfile.TemporaryDirectory(prefix="ptx_") as folder:
        gpu_aot.dump(fn, *specs, arch=arch, folder=folder, emitters=".*")
        return read_launch(Path(folder))


def read_launch(folder: Path) -> Launch:
    """The one launch of a kernel of Pallas in a dump.

    Raises:
      ValueError: if there is none, or several.
    """
    [hlo] = (path.read_text() for path in folder.glob("*gpu_after_optimizations.txt"))
    [thunks] = (path.read_text() for path in folder.glob("*thunk_sequence.txt"))
    name, operands, outputs, updated = _read_call(hlo[hlo.index("\nENTRY") :])
    pattern = rf" {name} grid: \[(\d+), 1, 1\] threads: \[(\d+), 1, 1\]\s+shared_memory: (\d+)"
    [(grid, threads, shared)] = re.findall(pattern, thunks)
    entry = re.compile(rf"\.entry\s+{name}\(")
    [text] = (t for path in folder.glob("*.ptx") if entry.search(t := path.read_text()))
    return Launch(text, int(threads), int(shared), int(grid), operands, outputs, updated=updated)


def _read_call(entry: str) -> tuple[str, tuple[int, ...], tuple, tuple]:
    """Of the one call of a Triton kernel in the entry computation, what a `Launch` says of it."""
    numbers = {n: int(i) for n, i in re.findall(r"%(\S+) = \S+ parameter\((\d+)\)", entry)}
    for name, source in re.findall(r"%(\S+) = \S+ (?:bitcast|copy)\(%(\S+?)\)", entry):
        if source in numbers:
            numbers[name] = numbers[source]
    pattern = (
        r"= (\(?[^=]*?\)?) custom-call\(([^)]*)\), "
        r'custom_call_target="__gpu\$xla\.gpu\.triton"(.*), name = "([^"]*)"'
    )
    [(shapes, names, more, kernel)] = re.findall(pattern, entry)
    operands = [re.sub(r"/\*.*?\*/", "", name).strip().lstrip("%") for name in names.split(",")]
    outputs = tuple(
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    )
    aliased = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", more)
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}", aliased[1]) if aliased else []
    updated = tuple((int(output or 0), int(operand)) for output, operand in pairs)
    return kernel, tuple(numbers[operand] for operand in operands), outputs, updated
