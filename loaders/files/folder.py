"""A checkpoint folder: its config.json and the tensors of its safetensors files, headers only.

Nothing outside of the folder is opened, whatever its files say or link to, unless the caller asks
with `follow_links` (Hugging Face's older `local_dir` layout: links into the hub's cache); and in it
nothing but safetensors files and what is read through `loaders.files.small_files`: code and pickles
stay closed.
"""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from loaders.errors import CheckpointError, Fault
from loaders.files.safetensors_file import TensorInfo, scan_header
from loaders.files.small_files import CONFIG, check_file, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SUFFIX = ".safetensors"
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_AGAIN = "download the checkpoint again"


@dataclasses.dataclass(frozen=True)
class Scan:
    """What the headers of a checkpoint's files say.

    Attributes:
      tensors: those of all headers that can be read, in the order in which they lie in the files.
      faults: what is wrong with the files.
      absent: tensors that the index names, and no header that can be read, with their file.
      unsound: names of the files whose header contradicts them: truncated ones above all.
    """

    tensors: Mapping[str, TensorInfo]
    faults: tuple[Fault, ...] = ()
    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unsound: frozenset[str] = frozenset()


def read_config(folder: Path, *, follow_links: bool = False) -> dict[str, Any]:
    """Read config.json.

    Raises:
      CheckpointError: if `folder` is no folder, or config.json is missing or not a JSON object.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(
            folder, [Fault("this is not a folder", way_out="give the path of a checkpoint folder")]
        )
    return read_json(folder, CONFIG, follow_links=follow_links)


def list_tensors(folder: Path, *, follow_links: bool = False) -> dict[str, TensorInfo]:
    """List every tensor of the checkpoint, in the order in which it lies in the files.

    The index is followed where there is one; else the folder holds `model.safetensors`.

    Raises:
      CheckpointError: listing shards that are missing, unsafe to open or malformed, and tensors on
        which the index and the headers disagree.
    """
    scan = scan_tensors(folder, follow_links=follow_links)
    if scan.faults:
        raise CheckpointError(folder, scan.faults)
    return dict(scan.tensors)


def scan_tensors(folder: Path, *, follow_links: bool = False) -> Scan:
    """Read the headers of all files that there are, whatever is wrong with the others.

    Raises:
      CheckpointError: if there is no file at all, or no index that can be read.
    """
    if not os.path.lexists(folder / INDEX):
        single = _find_single(folder, follow_links)
        tensors, wrong = scan_header(single)
        return Scan(tensors, tuple(wrong), unsound=frozenset([single.name] if wrong else []))
    weight_map = read_json(folder, INDEX, follow_links=follow_links).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(f, str) for f in weight_map.values())
    ):
        what = '"weight_map" must map tensor names to files'
        raise CheckpointError(folder, [Fault(what, INDEX, "", _AGAIN)])
    tensors: dict[str, TensorInfo] = {}
    faults: list[Fault] = []
    unsound: set[str] = set()
    names: dict[str, set[str]] = defaultdict(set)
    for name, shard in weight_map.items():
        names[shard].add(name)
    for shard, expected in sorted(names.items()):
        try:
            _check_name(folder, shard)
            header, wrong = scan_header(check_file(folder, shard, follow_links=follow_links))
        except CheckpointError as error:
            faults += error.faults
            continue
        if wrong:
            faults += wrong
            unsound.add(shard)
        faults += [
            Fault(f"the index says {shard} holds it, its header does not", shard, name, _AGAIN)
            for name in sorted(expected - header.keys())
        ]
        faults += [
            Fault(f"is in {shard}, but not in the index for it", shard, name, _AGAIN)
            for name in sorted(header.keys() - expected)
        ]
        tensors |= header
    if SINGLE not in names and os.path.lexists(folder / SINGLE):
        # transformers reads the one file, vLLM the shards
        what = f"{SINGLE} is there too, but the index does not name it: they are two models"
        way_out = f"remove {INDEX} if {SINGLE} is the model, else {SINGLE}"
        faults.insert(0, Fault(what, INDEX, way_out=way_out))
    absent = {name: shard for name, shard in weight_map.items() if name not in tensors}
    return Scan(tensors, tuple(faults), absent, frozenset(unsound))


def list_remarks(folder: Path, config: Mapping[str, Any], files: Collection[Path]) -> list[str]:
    """Warnings about what is in the folder and is not used.

    Args:
      folder: the checkpoint.
      config: its config.json.
      files: those of its safetensors files that are read.
    """
    read = {path.name for path in files}
    remarks = [
        f"{name}: not part of the checkpoint, so it is not read"
        for name in _list_names(folder)
        if name.endswith(_SUFFIX) and name not in read
    ]
    if config.get("auto_map"):
        remarks.append(f"{CONFIG}: auto_map names code of the checkpoint, which is never run here")
    return remarks


def _check_name(folder: Path, shard: str) -> None:
    """Refuse what the index calls a shard if it is a path, or may be code or a pickle."""
    if any(c in shard for c in "/\\\0") or not shard.endswith(_SUFFIX):
        what = f"a shard must be a plain file name that ends in {_SUFFIX}"
        way_out = "do not trust this checkpoint: no tool writes such a name"
        raise CheckpointError(folder, [Fault(what, INDEX, repr(shard), way_out)])


def _find_single(folder: Path, follow_links: bool) -> Path:
    """The one file of a checkpoint without an index."""
    names = [] if os.path.lexists(folder / SINGLE) else _list_names(folder)
    shards = [name for name in names if name.endswith(_SUFFIX)]
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if shards:
        what = f"the file is missing, and so is {INDEX}, which {shards[0]} needs"
    elif pickles:
        what = f"the file is missing; {pickles[0]} is a pickle, which can run code: never opened"
    else:
        return check_file(folder, SINGLE, follow_links=follow_links)
    way_out = _AGAIN if shards else "save the model as safetensors"
    raise CheckpointError(folder, [Fault(what, SINGLE, way_out=way_out)])


def _list_names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # a folder may be entered and not listed
        return []
