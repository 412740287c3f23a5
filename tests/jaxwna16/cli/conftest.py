"""The small checkpoint, float and packed, and the command called in-process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxwna16.bench import timing
from jaxwna16.checkpoints.quantize import quantize_checkpoint
from jaxwna16.cli.main import main
from tests.jaxwna16.cli.checkpoints import write_float_checkpoint


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call of the command left behind."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch) -> None:
    """As in a pipe: no width is given. (pytest-xdist gives its workers one.)"""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def _small_effort(monkeypatch) -> None:
    """`bench` measures little, in little memory."""
    small = timing.Effort(
        batch_seconds=1e-4,
        batches=3,
        layers=2,
        cold_bytes=20_000,
        limit_bytes=1_000_000,
        limit_size=64,
    )
    monkeypatch.setattr(timing, "ON_CPU", small)


@pytest.fixture
def call(capsys) -> Callable[..., Outcome]:
    """Run the command; no outcome may ever be a traceback."""

    def call(*argv: object) -> Outcome:
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory) -> Path:
    """A checkpoint that is not quantized."""
    folder = tmp_path_factory.mktemp("float") / "tiny"
    write_float_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def packed_folder(float_folder, tmp_path_factory) -> Path:
    """The same in 4 bits, groups of 32, with zero points."""
    folder = tmp_path_factory.mktemp("packed") / "tiny"
    quantize_checkpoint(float_folder, folder, bits=4, group_size=32, symmetric=False)
    return folder


@pytest.fixture
def broken(packed_folder, tmp_path) -> Path:
    """A copy of the packed checkpoint, to be damaged."""
    return Path(shutil.copytree(packed_folder, tmp_path / "broken"))
