"""A new checkpoint folder: safetensors shards and the small files beside them.

Everything goes into a hidden folder beside the destination. The folder gets its final name at the
very end, when all is on the disk, so a crash or a kill never leaves half a checkpoint under that
name. What it leaves has the hidden name; the next call removes it. Memory: one shard.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from loaders.errors import CheckpointError, Fault
from loaders.files.folder import INDEX
from loaders.files.small_files import read_bytes

SHARD_BYTES = 2_000_000_000
_STEM = "model"  # of what transformers and vLLM look for
_COPIED = (".json", ".txt", ".model", ".jinja")
_TEMPLATES = "additional_chat_templates"  # named ones, beside that of chat_template.jinja
# the last three say how AutoGPTQ, AutoAWQ and AutoRound packed weights that are not there any more
_NOT_COPIED = (
    *("config.json", INDEX),
    *("quantize_config.json", "quant_config.json", "quantization_config.json"),
)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object for programs and people."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path, *, follow_links: bool = False) -> None:
    """Copy what lies beside the weights: tokenizer, generation config, chat template, license.

    Raises:
      CheckpointError: if one of them is no file, cannot be read, is larger than any tool writes, or
        is a link that leaves the checkpoint, without `follow_links`.
    """
    if (source / _TEMPLATES).is_dir():
        (folder / _TEMPLATES).mkdir()
    for name in list_companions(source):
        (folder / name).write_bytes(read_bytes(source, name, follow_links=follow_links))


def list_companions(source: Path) -> list[str]:
    """The names of what `copy_companions` copies."""
    return [
        str(path.relative_to(source))
        for path in sorted([*source.iterdir(), *(source / _TEMPLATES).glob("*.jinja")])
        if (path.suffix in _COPIED or path.stem.upper().startswith("LICENSE"))
        and path.name not in _NOT_COPIED
        and not path.is_dir()
    ]


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    stem: str = _STEM,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[dict[str, str], int]:
    """Write safetensors files, one if everything fits into it.

    Args:
      folder: where to.
      tensors: names and arrays, taken one after the other.
      stem: what the names of the files begin with.
      shard_bytes: a shard is closed when it holds this much.

    Returns:
      Tensor name -> name of its file, and the bytes of all tensors.
    """
    shards = _write_numbered(folder, tensors, shard_bytes)
    total, weight_map = len(shards), {}
    for i, shard in enumerate(shards):
        name = f"{stem}.safetensors"
        if total > 1:
            name = f"{stem}-{i + 1:05}-of-{total:05}.safetensors"
        os.replace(folder / f"{i}.safetensors", folder / name)
        (folder / name).chmod(0o644)
        weight_map |= dict.fromkeys(shard, name)
    return weight_map, sum(sum(shard.values()) for shard in shards)


@contextmanager
def build_folder(destination: Path) -> Iterator[Path]:
    """Give a hidden folder to fill, which becomes `destination` if the block ends well.

    Raises:
      CheckpointError: if the destination exists, another process is making it, or the file system
        refuses.
    """
    if os.path.lexists(destination):
        way_out = "name a new folder, or remove this one"
        raise CheckpointError(
            destination, [Fault("the destination exists already", way_out=way_out)]
        )
    partial = destination.absolute().with_name(f".{destination.name}.partial")
    try:
        with _claim(partial, destination):
            yield partial
            _flush(partial)
            os.replace(partial, destination)
    except OSError as error:
        fault = Fault(f"cannot be written: {error.strerror or error}", str(error.filename or ""))
        raise CheckpointError(destination, [fault]) from error
    except SafetensorError as error:  # what a full disk is to safetensors
        raise CheckpointError(destination, [Fault(f"cannot be written: {error}")]) from error


@contextmanager
def _claim(partial: Path, destination: Path) -> Iterator[None]:
    """Own the hidden folder, empty, while the block runs; if that fails, nothing stays of it.

    The lock on it ends with the process, however that ends: a folder without one was left behind.
    """
    partial.mkdir(parents=True, exist_ok=True)
    holder = None if sys.platform == "win32" else _lock(partial, destination)
    try:
        for leftover in partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if holder is not None:
            os.close(holder)


def _lock(partial: Path, destination: Path) -> int:
    """A file descriptor that holds the lock on the hidden folder."""
    import fcntl  # not there on Windows

    # a link could lead to a folder that is somebody's
    holder = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # its owner may have given it its final name since it was opened
        if os.path.samestat(os.fstat(holder), os.stat(partial)):
            return holder
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        return holder  # a file system without locks
    os.close(holder)
    fault = Fault("another process is making it", way_out="wait for it, or name another folder")
    raise CheckpointError(destination, [fault])


def _flush(folder: Path) -> None:
    """Wait until every file is on the disk: a name must not outlive what it names."""
    for path in filter(Path.is_file, folder.rglob("*")):
        file = os.open(path, os.O_RDWR)  # some systems flush what is open for writing only
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _write_numbered(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> list[dict[str, int]]:
    """Write numbered shards; returns name -> bytes of the tensors of each."""
    shards: list[dict[str, int]] = []
    held: dict[str, np.ndarray] = {}

    def close_shard() -> None:
        save_file(held, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append({name: array.nbytes for name, array in held.items()})
        held.clear()

    for name, array in tensors:
        if held and sum(a.nbytes for a in held.values()) + array.nbytes > shard_bytes:
            close_shard()
        held[name] = np.asarray(array, order="C")
    close_shard()
    return shards
