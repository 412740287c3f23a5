"""Whether a file changes while a checkpoint is read: its stamp is another then.

A stamp is size, time of the last change of the contents, and time of the last change of anything,
which nobody can set back. What is on the disk is not compared: numbers of the file system's inodes
change by themselves where it is a network's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from loaders.errors import CheckpointError, Fault

Stamp = tuple[int, int, int]


def make_stamp(found: os.stat_result) -> Stamp:
    """The stamp of a file, or of what a link leads to."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def take_stamps(folder: Path) -> dict[str, Stamp]:
    """Name -> stamp of what is in a folder, and in the folders in it; {} if there is none."""
    paths = [*folder.glob("*"), *folder.glob("*/*")]
    stamps = {str(path.relative_to(folder)): _find_stamp(path) for path in paths}
    return {name: stamp for name, stamp in stamps.items() if stamp is not None}


def refuse_changes(folder: Path, before: Mapping[str, Stamp], names: Iterable[str]) -> None:
    """Compare files with what they were before the first of them was read.

    Args:
      folder: that they are in.
      before: from `take_stamps`.
      names: of those that were read, or would have been, had they been there.

    Raises:
      CheckpointError: naming those that have changed, are gone or were not there.
    """
    changed = [
        name for name in dict.fromkeys(names) if _find_stamp(folder / name) != before.get(name)
    ]
    if changed:
        what, way_out = "changed while the checkpoint was read", "do it again"
        raise CheckpointError(folder, [Fault(what, name, "", way_out) for name in changed])


def _find_stamp(path: Path) -> Stamp | None:
    try:
        return make_stamp(os.stat(path))
    except OSError:
        return None
