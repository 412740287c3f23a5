"""The one way in which files beside the weights are read: config.json, tokenizer, templates, all.

A checkpoint comes from a stranger, so a file may be a link to what is the reader's own, a pipe that
never ends, a terabyte of nothing, or JSON that one tool reads in one way and the next in another.
Each is refused before it costs anything. A link may lead to another file of the folder, or to a
blob of the hub cache that the folder is in; with `follow_links` to any file.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from loaders.errors import CheckpointError, Fault
from loaders.files.safetensors_file import open_file, refuse_duplicates

MAX_BYTES = 100_000_000
"""Of a file; the largest are indices, manifests and vocabularies, of 35 MB today."""
MAX_SETTINGS_BYTES = 32_000_000
"""Of a file of settings, whose JSON may take twenty times its size in memory."""
CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
_SETTINGS = (CONFIG, GENERATION, TOKENIZER_SETTINGS, SPECIAL_TOKENS)
_MAX_NESTING = 64
_MAX_VALUES = 5_000_000  # of JSON, up to 200 bytes of memory each; vocabularies have 2 million
_AGAIN = "download the checkpoint again"
_FOLLOW = (
    "pass follow_links=True, on the command line --follow-links, if you trust where it leads; or "
    "put the file itself into the folder"
)


def is_there(folder: Path, name: str) -> bool:
    """Whether a folder has a file of this name, be it one that cannot be read."""
    return os.path.lexists(folder / name)


def read_settings(folder: Path, name: str, *, follow_links: bool = False) -> dict[str, Any]:
    """The object in a JSON file beside the weights, {} if there is no such file.

    Raises:
      CheckpointError: as `read_json`, but for a missing file.
    """
    if not is_there(folder, name):
        return {}
    return read_json(folder, name, follow_links=follow_links)


def read_json(
    folder: Path, name: str, *, follow_links: bool = False, most: int = MAX_BYTES
) -> dict[str, Any]:
    """Read a JSON object from a file of the checkpoint; arguments as `read_bytes`.

    Raises:
      CheckpointError: as `read_bytes`, and if the file holds something else, is nested deeply, or
        has a key twice.
    """
    content = read_bytes(folder, name, follow_links=follow_links, most=_limit(name, most))
    try:
        value = _parse(content)
    except ValueError as error:
        raise _error(folder, name, f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        what = f"expected a JSON object, found {type(value).__name__}"
        raise _error(folder, name, what)
    return value


def read_text(folder: Path, name: str, *, follow_links: bool = False, most: int = MAX_BYTES) -> str:
    """Read a file of the checkpoint as UTF-8; arguments as `read_bytes`.

    Raises:
      CheckpointError: as `read_bytes`, and if it is not UTF-8.
    """
    content = read_bytes(folder, name, follow_links=follow_links, most=most)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _error(folder, name, f"not UTF-8: {error}") from None


def read_bytes(
    folder: Path, name: str, *, follow_links: bool = False, most: int = MAX_BYTES
) -> bytes:
    """Read a file of the checkpoint whole.

    Args:
      folder: the checkpoint.
      name: of the file, as a path from the folder on.
      follow_links: read it also where it is a link that leaves the folder.
      most: bytes that it may have.

    Raises:
      CheckpointError: if it is missing, larger, no regular file, leaves the folder, or cannot be
        read.
    """
    # what was checked is opened, not a link that may lead to something else by now
    path = _resolve(folder, name, follow_links)
    try:
        with io.BufferedReader(open_file(path)) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                way_out = "no tool writes one as large: remove it"
                raise _error(
                    folder, name, f"has {size:,} bytes, expected {most:,} at most", way_out
                )
            content = file.read(size + 1)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise _error(folder, name, f"cannot be read: {reason}") from None
    if len(content) != size:
        raise _error(folder, name, "changed while it was read", "load it again")
    return content


def list_settings_faults(folder: Path, *, follow_links: bool = False) -> list[Fault]:
    """What is wrong with the files beside the weights that this library reads, as files."""
    readers = dict.fromkeys((*_SETTINGS, TOKENIZER), read_json) | {TEMPLATE: read_text}
    faults: list[Fault] = []
    for name, read in readers.items():
        if is_there(folder, name):
            try:
                read(folder, name, follow_links=follow_links)
            except CheckpointError as error:
                faults += error.faults
    return faults


def check_file(folder: Path, name: str, *, follow_links: bool = False) -> Path:
    """The path of a file of the checkpoint, provided that opening it stays inside the folder.

    With `follow_links` it may leave the folder, for a file.

    Raises:
      CheckpointError: if it does not, or if there is no such file.
    """
    _resolve(folder, name, follow_links)
    return folder / name


def _resolve(folder: Path, name: str, follow_links: bool) -> Path:
    """Where a file of the checkpoint lies, links followed; errors as `check_file`."""
    real, fault = folder, None
    try:
        real = (folder / name).resolve(strict=True)
        if not follow_links and not any(real.is_relative_to(root) for root in _list_roots(folder)):
            what = "the file is a link that leaves the checkpoint folder"
            fault = Fault(what, name, "", _FOLLOW)
        elif not real.is_file():
            fault = Fault("this is not a file", name, "", _AGAIN)
    except FileNotFoundError:
        fault = Fault("the file is missing", name, way_out=_AGAIN)
    except (OSError, RuntimeError, ValueError) as error:
        # a name too long or impossible to encode, or links in a circle
        fault = Fault(f"cannot be opened: {type(error).__name__}", repr(name), "", _AGAIN)
    if fault is not None:
        raise CheckpointError(folder, [fault])
    return real


def _limit(name: str, most: int) -> int:
    return min(most, MAX_SETTINGS_BYTES) if name in _SETTINGS else most


def _parse(content: bytes) -> Any:
    count = sum(map(content.count, (b"[", b"{", b",")))  # one begins each value
    if count > _MAX_VALUES:
        raise ValueError(f"it has {count:,} values, expected {_MAX_VALUES:,} at most")
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=refuse_duplicates)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    _check_nesting(value)
    return value


def _check_nesting(value: object) -> None:
    """Refuse what Python could read, but then not print.

    Raises:
      ValueError: if lists and objects stand in each other too deeply.
    """
    level = [value]
    for _ in range(_MAX_NESTING):
        lists = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [v for held in lists if isinstance(held, list) for v in held]
    if level:
        raise ValueError(f"nested more than {_MAX_NESTING} levels deep")


def _error(folder: Path, name: str, what: str, way_out: str = _AGAIN) -> CheckpointError:
    return CheckpointError(folder, [Fault(what, name, "", way_out)])


def _list_roots(folder: Path) -> list[Path]:
    """The folder itself; in a hub cache (snapshots/REVISION) also the blobs its links point to."""
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parents[1] / "blobs")
    return roots
