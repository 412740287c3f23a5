"""Take mutants through a worker, and count what became of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fuzz.beside.bases import make_bases
from tests.fuzz.beside.mutations import MUTATIONS
from tests.fuzz.drive import Figures, draw_mutants, drive
from tests.fuzz.files import Entry, write_entries
from tests.peaks import note_started

STEPS = ("inspect", "verify", "load_model", "tokenizer", "chat", "generate")
_WAITING_SECONDS = 240.0
"""By the clock, after which a worker is ended; on its own it ends after 10 s of computing."""


class Worker:
    """The process of `tests.fuzz.beside.worker`, started again when a mutant has ended it.

    Args:
      seconds: of computing that one call of a template or tokenizer may take.
      megabytes: that the process of a tokenizer may have.
    """

    def __init__(self, seconds: float, megabytes: int):
        self._limits = str(seconds), str(megabytes)
        self._process: subprocess.Popen[str] | None = None

    def use(self, folder: Path) -> dict[str, Any]:
        """What became of a mutant.

        Raises:
          AssertionError: if it ended the worker, by an error that is not ours or at a limit.
        """
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(_WAITING_SECONDS, process.kill)
        timer.start()
        reply = ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(str(folder)) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        timer.cancel()
        if not reply:
            raise AssertionError(f"the worker ended: {self.stop()}")
        found = json.loads(reply)
        note_started(found.pop("peak"))
        return found

    def stop(self) -> str:
        """End it; its exit code and the end of its errors."""
        process, self._process = self._process, None
        if process is None:
            return ""
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        code = process.wait()
        self._errors.seek(0)
        text = self._errors.read()[-6000:]
        self._errors.close()
        return f"exit code {code}\n{text}"

    def _start(self) -> subprocess.Popen[str]:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        flags = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.beside.worker", *self._limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": flags,
                "RUST_BACKTRACE": "0",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
        )
        return self._process


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A checkpoint that somebody changed: of which base, how, and the files that it has now."""

    base: str
    what: str
    files: Mapping[str, Entry] = dataclasses.field(repr=False)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        others = {n: e for n, e in self.files.items() if e != make_bases()[self.base].get(n)}
        printer.text(f"{self!r}: {others!r:.3000}")  # Hypothesis prints it field by field otherwise


@dataclasses.dataclass
class Tally(Figures):
    """What became of the mutants of one mutation, with their refusals by step."""

    generated: int = 0
    refused: Counter[str] = dataclasses.field(default_factory=Counter)
    slowest: str = ""

    def count(self, what: str, found: Mapping[str, Any]) -> None:
        """Add one."""
        if found["seconds"] > self.worst_seconds:
            self.slowest = what
        self.add(found["seconds"], found["bytes"])
        self.refused.update(step for step, error in found["outcome"].items() if error)
        ends = [found["outcome"].get(step) for step in ("chat", "generate")]
        self.generated += "" in ends


def check_mutant(files: Mapping[str, Entry], root: Path, worker: Worker) -> dict[str, Any]:
    """Write a mutant and take it through everything.

    Raises:
      AssertionError: if it breaks the promise.
    """
    folder = root / "c"
    shutil.rmtree(folder, ignore_errors=True)
    write_entries(folder, files)
    return worker.use(folder)


def check_bases(root: Path, worker: Worker) -> None:
    """Take the bases through everything, which also compiles the programs; none is refused."""
    for files in make_bases().values():
        found = check_mutant(files, root, worker)
        assert not any(found["outcome"].values()), found


def run(mutation: str, mutants: int, start: int, worker: Worker) -> Tally:
    """Check that many mutants; the same ones for the same `start`.

    Raises:
      AssertionError: with the smallest mutant that breaks the promise.
    """
    tally = Tally()
    with tempfile.TemporaryDirectory() as root:

        def check(mutant: Mutant) -> None:
            tally.count(mutant.what, check_mutant(mutant.files, Path(root), worker))

        drawn = draw_mutants(Mutant, make_bases(), MUTATIONS[mutation])
        tally.distinct = drive(drawn, mutants, start, check, report_multiple_bugs=False)
    return tally
