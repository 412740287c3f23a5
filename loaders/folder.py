"""A checkpoint folder: its config.json and the tensors of its safetensors files, headers only."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from loaders.errors import CheckpointError, Fault
from loaders.safetensors_file import TensorInfo, read_header, refuse_duplicates

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
      CheckpointError: if `folder` is no folder, or config.json is missing or not a JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(
            folder, [Fault("this is not a folder", way_out="name a checkpoint folder")]
        )
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of the checkpoint.

    Raises:
      CheckpointError: if the file is missing, holds something else, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=refuse_duplicates)
    except OSError as error:
        fault = Fault(f"cannot be read: {error.strerror}", path.name)
    except (ValueError, RecursionError) as error:
        fault = Fault(f"not valid JSON: {error}", path.name)
    else:
        if isinstance(value, dict):
            return value
        fault = Fault(f"expected a JSON object, found {type(value).__name__}", path.name)
    raise CheckpointError(path.parent, [fault])


def list_tensors(folder: Path) -> dict[str, TensorInfo]:
    """List every tensor of the checkpoint, in the order in which it lies in the files.

    The index is followed where there is one; else the folder holds `model.safetensors`.

    Raises:
      CheckpointError: listing shards that are missing, unsafe to open or malformed, and tensors on
        which the index and the headers disagree.
    """
    if not (folder / INDEX).exists():
        return read_header(_check_shard(folder, SINGLE))
    weight_map = read_json(folder / INDEX).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(f, str) for f in weight_map.values())
    ):
        raise CheckpointError(folder, [Fault('"weight_map" must map tensor names to files', INDEX)])
    tensors: dict[str, TensorInfo] = {}
    faults: list[Fault] = []
    names: dict[str, set[str]] = defaultdict(set)
    for name, shard in weight_map.items():
        names[shard].add(name)
    for shard, expected in sorted(names.items()):
        try:
            header = read_header(_check_shard(folder, shard))
        except CheckpointError as error:
            faults += error.faults
            continue
        faults += [
            Fault(f"the index says {shard} holds it, its header does not", shard, name)
            for name in sorted(expected - header.keys())
        ]
        faults += [
            Fault(f"stands in {shard}, but not in the index for it", shard, name)
            for name in sorted(header.keys() - expected)
        ]
        tensors |= header
    if faults:
        raise CheckpointError(folder, faults)
    return tensors


def _check_shard(folder: Path, name: str) -> Path:
    """The path of a shard, provided that opening it stays inside the checkpoint."""
    path, fault = folder / name, None
    if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
        fault = Fault("a shard must be a plain file name", INDEX, repr(name))
    else:
        try:
            real = path.resolve(strict=True)
            if not any(real.is_relative_to(root) for root in _list_roots(folder)):
                fault = Fault("the file is a link that leaves the checkpoint folder", name)
            elif not real.is_file():
                fault = Fault("this is not a file", name)
        except FileNotFoundError:
            fault = Fault("the file is missing", name, way_out="download the checkpoint again")
        except (OSError, RuntimeError, ValueError) as error:
            # a name too long or impossible to encode, or links in a circle
            fault = Fault(f"cannot be opened: {type(error).__name__}", INDEX, repr(name))
    if fault is not None:
        raise CheckpointError(folder, [fault])
    return path


def _list_roots(folder: Path) -> list[Path]:
    """The folder itself; in a hub cache (snapshots/REVISION) also the blobs its links point to."""
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parents[1] / "blobs")
    return roots
