"""Write a checkpoint that can be read again: it gets its name only after it was planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loaders.errors import CheckpointError, Fault
from loaders.files.folder import INDEX
from loaders.files.new_folder import (
    SHARD_BYTES,
    build_folder,
    copy_companions,
    write_json,
    write_shards,
)
from loaders.plan import make_plan


def write_checkpoint(
    destination: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    config: Mapping[str, Any],
    *,
    beside: Path,
    follow_links: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors` and `config` to a new folder.

    Args:
      destination: the folder to make; it must not exist.
      tensors: names and arrays, taken one after the other.
      config: what becomes config.json.
      beside: the source checkpoint, whose tokenizer, generation config, chat template and license
        files are copied.
      follow_links: copy these also where they are links that leave the source.
      shard_bytes: a shard is closed when it holds this much.

    Raises:
      CheckpointError: if the destination exists or cannot be written, or if the result could not
        be read.
    """
    with build_folder(destination) as folder:
        copy_companions(beside, folder, follow_links=follow_links)
        weight_map, size = write_shards(folder, tensors, shard_bytes=shard_bytes)
        if len(set(weight_map.values())) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_json(folder / INDEX, index)
        write_json(folder / "config.json", config)
        _check_readable(folder, destination)


def _check_readable(folder: Path, destination: Path) -> None:
    """Refuse to name what `make_plan` cannot read: the model holds something unexpected."""
    try:
        make_plan(folder)
    except CheckpointError as error:
        what = "the new checkpoint could not be read again, and is removed"
        raise CheckpointError(destination, [Fault(what), *error.faults]) from None
