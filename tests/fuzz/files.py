"""The files of a mutant: bytes, or what stands where a file should be."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclasses.dataclass(frozen=True)
class Special:
    """A folder or a named pipe."""

    kind: str


FOLDER, PIPE = Special("folder"), Special("pipe")
Entry = bytes | Link | Special


def write_entries(folder: Path, files: Mapping[str, Entry]) -> None:
    """Write everything into a new folder."""
    folder.mkdir()
    for name, entry in files.items():
        path = folder / name
        if isinstance(entry, bytes):
            path.write_bytes(entry)
        elif isinstance(entry, Link):
            path.symlink_to(entry.target)
        elif entry is FOLDER:
            path.mkdir()
        else:
            os.mkfifo(path)
