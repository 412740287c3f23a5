"""Write a checkpoint that can be read again: it gets its name only after it was planned.

What it is made of must not change meanwhile: `refuse_changes_of` is asked at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loaders.converted.fingerprint import list_files
from loaders.errors import CheckpointError, Fault
from loaders.files.folder import INDEX
from loaders.files.new_folder import (
    SHARD_BYTES,
    build_folder,
    copy_companions,
    list_companions,
    write_json,
    write_shards,
)
from loaders.files.stamps import Stamp, refuse_changes
from loaders.plan import Plan, make_plan


def write_checkpoint(
    destination: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    config: Mapping[str, Any],
    *,
    beside: Path,
    follow_links: bool = False,
    shard_bytes: int = SHARD_BYTES,
    check: Callable[[], None] = lambda: None,
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
      check: called before the folder gets its name, to raise if that must not be.

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
        check()


def refuse_changes_of(plan: Plan, before: Mapping[str, Stamp]) -> None:
    """Refuse a source whose files are not what they were before it was planned.

    Args:
      plan: of the source.
      before: from `take_stamps`.

    Raises:
      CheckpointError: naming the files that have changed.
    """
    parts = [*plan.plain.values()]
    parts += [info for module in plan.quantized.values() for info in module.tensors.values()]
    names = list_files(plan.folder, {info.file for info in parts})
    refuse_changes(plan.folder, before, [*names, INDEX, *list_companions(plan.folder)])


def _check_readable(folder: Path, destination: Path) -> None:
    """Refuse to name what `make_plan` cannot read: the model holds something unexpected."""
    try:
        make_plan(folder)
    except CheckpointError as error:
        what = "the new checkpoint could not be read again, and is removed"
        raise CheckpointError(destination, [Fault(what), *error.faults]) from None
