"""The fingerprint of a checkpoint: what its files were when a converted copy was made of them.

If the source is still at its place, a copy is valid only as long as the source has not changed.
Otherwise somebody who corrects or replaces a checkpoint would go on computing with the old one.
config.json, the index, and the size, header and time of change of each shard are compared. The
contents of a shard are read only if nothing but its time has changed. Files that are gone are not
compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from loaders.errors import Fault
from loaders.files.folder import INDEX, SINGLE
from loaders.files.safetensors_file import MAX_HEADER_BYTES, open_file
from loaders.files.small_files import CONFIG

CHUNK_BYTES = 1 << 20
_AGAIN = "convert it again"


@dataclasses.dataclass(frozen=True)
class FilePrint:
    """One file: bytes, time of change, SHA-256 of the contents, and of a shard's header ("")."""

    size: int
    mtime_ns: int
    sha256: str
    header_sha256: str


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """A checkpoint folder, and its files by name: config.json, the index if any, the shards."""

    folder: str
    files: Mapping[str, FilePrint]


def list_files(folder: Path, shards: Iterable[Path]) -> list[str]:
    """The names of the files that a fingerprint is taken of.

    Args:
      folder: of the checkpoint.
      shards: the files that its tensors are in.
    """
    first = [CONFIG, INDEX] if os.path.lexists(folder / INDEX) else [CONFIG]
    return [*first, *sorted({path.name for path in shards})]


def take_fingerprint(
    folder: Path, names: Iterable[str], report: Callable[[int], None]
) -> Fingerprint:
    """Read files whole.

    Args:
      folder: of the checkpoint.
      names: from `list_files`.
      report: called with the number of bytes read, forevery piece.

    Raises:
      OSError: if one cannot be read.
    """
    files = {}
    for name in names:
        with open_file(folder / name) as file:
            found = os.fstat(file.fileno())
            header = "" if name in (CONFIG, INDEX) else _hash_header(file)
            files[name] = FilePrint(found.st_size, found.st_mtime_ns, _hash(file, report), header)
    return Fingerprint(str(folder.absolute()), files)


def check_source(source: Fingerprint, manifest: str) -> tuple[list[Fault], list[str]]:
    """Compare a checkpoint with its fingerprint.

    Args:
      source: the fingerprint.
      manifest: name of the file that it was read from.

    Returns:
      Faults of a checkpoint that has changed, and remarks.
    """
    folder, changes, warnings = Path(source.folder), {}, []
    if not folder.is_absolute():  # made on a system where paths look different
        return [], []
    for name, taken in source.files.items():
        try:
            with open_file(folder / name) as file:
                change = _find_change(file, taken)
                touched = os.fstat(file.fileno()).st_mtime_ns != taken.mtime_ns
        except (OSError, ValueError):
            continue  # gone, or out of reach
        if change:
            changes[name] = change
        elif touched and taken.header_sha256:
            warnings.append(
                f"{folder / name} was touched since it was converted: its contents are the same, "
                f"but had to be read to find out ({_AGAIN} to save the time)"
            )
    for name in (SINGLE, INDEX):
        if name not in source.files and os.path.lexists(folder / name):
            changes[name] = "it was not there"
    faults = [
        Fault(
            f"was converted from {folder}, where {name} has changed: {change}", manifest, "", _AGAIN
        )
        for name, change in changes.items()
    ]
    return faults, warnings


def _find_change(file: io.FileIO, taken: FilePrint) -> str:
    """What has changed, in words, "" if nothing has."""
    found = os.fstat(file.fileno())
    if found.st_size != taken.size:
        return f"it has {found.st_size} bytes, it had {taken.size}"
    if taken.header_sha256:
        if _hash_header(file) != taken.header_sha256:
            return "its header differs"
        if found.st_mtime_ns == taken.mtime_ns:
            return ""
    return "" if _hash(file, lambda _: None) == taken.sha256 else "its contents differ"


def _hash_header(file: io.FileIO) -> str:
    """SHA-256 of a safetensors file's length field and header."""
    start = file.read(8)
    length = min(int.from_bytes(start, "little"), MAX_HEADER_BYTES)
    return hashlib.sha256(start + file.read(length)).hexdigest()


def _hash(file: io.FileIO, report: Callable[[int], None]) -> str:
    """SHA-256 of the whole file."""
    digest, chunk = hashlib.sha256(), bytearray(CHUNK_BYTES)
    file.seek(0)
    while count := file.readinto(chunk):
        digest.update(memoryview(chunk)[:count])
        report(count)
    return digest.hexdigest()
