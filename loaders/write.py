"""Write a checkpoint folder: safetensors shards, config.json and the small files beside them.

Everything goes into a hidden folder beside the destination, which gets its name at the very end, so
a crash or a kill never leaves half a checkpoint under the final name. Memory: one shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from loaders.errors import CheckpointError, Fault
from loaders.folder import INDEX, SINGLE

SHARD_BYTES = 2_000_000_000
_COPIED = (".json", ".txt", ".model", ".jinja")


def write_checkpoint(
    destination: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    config: Mapping[str, Any],
    *,
    beside: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors` and `config` to a new folder.

    Args:
      destination: the folder to make; it must not exist.
      tensors: names and arrays, taken one after the other.
      config: what becomes config.json.
      beside: the source checkpoint, whose tokenizer, generation config, chat template and license
        files are copied.
      shard_bytes: a shard is closed when it holds this much.

    Raises:
      CheckpointError: if the destination exists or cannot be written.
    """
    with build_folder(destination) as folder:
        for path in sorted(beside.iterdir()):
            wanted = path.suffix in _COPIED or path.stem.upper().startswith("LICENSE")
            if wanted and path.is_file() and path.name not in ("config.json", INDEX):
                shutil.copyfile(path, folder / path.name)
        shards = _write_shards(folder, tensors, shard_bytes)
        _name_shards(folder, shards)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def build_folder(destination: Path) -> Iterator[Path]:
    """Give a hidden folder to fill, which becomes `destination` if the block ends well.

    Raises:
      CheckpointError: if the destination exists, or the file system refuses.
    """
    if os.path.lexists(destination):
        way_out = "name a new folder, or remove this one"
        raise CheckpointError(
            destination, [Fault("the destination exists already", way_out=way_out)]
        )
    partial = destination.absolute().with_name(f".{destination.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, destination)
    except OSError as error:
        fault = Fault(f"cannot be written: {error.strerror or error}", str(error.filename or ""))
        raise CheckpointError(destination, [fault]) from error
    except SafetensorError as error:  # what a full disk is to safetensors
        raise CheckpointError(destination, [Fault(f"cannot be written: {error}")]) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(
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


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Give the shards their final names, and write the index where there are several."""
    total, weight_map = len(shards), {}
    for i, shard in enumerate(shards):
        name = SINGLE if total == 1 else f"model-{i + 1:05}-of-{total:05}.safetensors"
        os.replace(folder / f"{i}.safetensors", folder / name)
        (folder / name).chmod(0o644)
        weight_map |= dict.fromkeys(shard, name)
    if total > 1:
        size = sum(sum(shard.values()) for shard in shards)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
