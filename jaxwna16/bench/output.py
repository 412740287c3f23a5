"""Result files: each is written beside its place under another name, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxwna16.bench import plot
from jaxwna16.bench.report import write_markdown


def write_tables(report: dict[str, Any], folder: Path, name: str) -> list[str]:
    """Write NAME.json and NAME.md.

    Raises:
      OSError: if the folder cannot be written.
    """
    with _draft(folder, name) as stem:
        stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        stem.with_suffix(".md").write_text(write_markdown(report), "utf-8")
        return _move(stem.parent, folder)


def write_plot(report: dict[str, Any], folder: Path, name: str) -> list[str]:
    """Draw what was timed into NAME.png; nothing where nothing was.

    Raises:
      InputError: if matplotlib is not installed.
      OSError: if the folder cannot be written.
    """
    if not any(row["figures"] for row in report["rows"]):
        return []
    with _draft(folder, name) as stem:
        plot.draw(report, stem.with_suffix(".png"))
        return _move(stem.parent, folder)


@contextmanager
def _draft(folder: Path, name: str) -> Iterator[Path]:
    """Where files are made: a path without ending, in a hidden folder that goes away."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as draft:
        yield Path(draft, name)


def _move(draft: Path, folder: Path) -> list[str]:
    moved = []
    for path in sorted(draft.iterdir()):
        os.replace(path, folder / path.name)
        moved.append(str(folder / path.name))
    return moved
