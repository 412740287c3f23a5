"""What is asked of the writers: each model, with each setting."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.jaxwna16.models.family_rows import ROWS
from tests.writers.sources import Source

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-writers"
WRITERS = {
    "llm-compressor": ("llmcompressor", "by_llmcompressor"),
    "AutoRound": ("auto-round", "by_auto_round"),
    "GPTQModel": ("gptqmodel", "by_gptqmodel"),
}
"""Name -> its environment, and the module that uses it there."""
NEAREST, CALIBRATED = "nearest", "calibrated"
METHODS = {
    "llm-compressor": {NEAREST: "round to nearest", CALIBRATED: "GPTQ"},
    "AutoRound": {
        NEAREST: "round to nearest, written as llm-compressor does",
        CALIBRATED: "its signed gradients (2 steps), in its own format",
    },
    "GPTQModel": {NEAREST: "round to nearest", CALIBRATED: "GPTQ"},
}
SECONDS = 600
"""For one model."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How weights are quantized, in 4 bits."""

    method: str
    symmetric: bool
    channel: bool

    def __str__(self) -> str:
        scheme = "W4A16" if self.symmetric else "W4A16_ASYM"
        return f"{scheme} {'channel' if self.channel else 'groups'} {self.method}"


SETTINGS = [
    Setting(method, symmetric, channel)
    for channel, method, symmetric in itertools.product(
        (False, True), (NEAREST, CALIBRATED), (False, True)
    )
]


_WHOLE = ("llama", "mixtral")
_TWO = [Setting(NEAREST, False, False), Setting(CALIBRATED, True, False)]


def list_settings(model: str) -> list[Setting]:
    """All of them for two models, dense and of experts; for the others, one of each method; and the
    calibrated one for those whose layers another has.

    The settings decide what is written for a weight, and the model what its weights are called.
    """
    if model in ROWS and ROWS[model].is_repeated:
        return _TWO[1:]
    return SETTINGS if model in _WHOLE else _TWO


class WriterError(Exception):
    """A writer does not start."""


class Writer:
    """A process of a writer's own environment that does what it is told, one order at a time."""

    def __init__(self, name: str, log: Path):
        environment, module = WRITERS[name]
        python = ENVIRONMENTS / environment / "bin" / "python"
        if not python.exists():
            raise WriterError(f"no environment {python}")
        self.log = log
        self.command = [python, Path(__file__).with_name("theirs") / "worker.py", module]
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            text=True,
            cwd=ENVIRONMENTS,  # nothing of this repository can be imported
        )
        found = self._read()
        if found is None:
            said = self.log.read_text("utf-8").strip().splitlines()[-1:]
            raise WriterError(f"does not start: {' '.join(said)}")
        self.versions: dict[str, str] = found

    def _read(self) -> dict[str, Any] | None:
        """Its answer; None if the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def write(self, source: Source, setting: Setting, folder: Path) -> str | None:
        """Let it write a folder, and its logits beside that; what it failed with, if it did."""
        order = {
            "source": str(source.folder),
            "class": source.kind,
            "ignore": source.ignore,
            "calibration": str(source.calibration),
            "tokens": str(source.tokens),
            "folder": str(folder),
            "logits": str(name_logits(folder)),
            "calibrated": setting.method == CALIBRATED,
            "symmetric": setting.symmetric,
            "group_size": -1 if setting.channel else source.group_size,
            "seconds": SECONDS,
        }
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        found = self._read()
        if found is None:
            status = self.process.wait()
            self._start()
            return f"its process ended with status {status}"
        return found.get("error")

    def stop(self) -> None:
        """No order follows."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def name_logits(folder: Path) -> Path:
    """Where the logits of the writer's own model are."""
    return folder.with_name(f"{folder.name}.npy")


def report(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)
