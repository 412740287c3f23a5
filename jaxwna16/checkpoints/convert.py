"""`convert_checkpoint`: a copy of a checkpoint that loads as fast as its bytes are read.

The copy holds the params tree as it is computed with (`loaders.converted.converted`). Memory: one
shard of the copy, or one stack of experts if that is larger, and the tensors that it is made of.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxwna16.checkpoints.load import resolve_folder
from jaxwna16.programs import refuse_fork
from jaxwna16.progress import show_bytes
from jaxwna16.version import __version__
from loaders.converted.converted import hash_leaf
from loaders.converted.fingerprint import Fingerprint, list_files, take_fingerprint
from loaders.converted.manifest import MANIFEST, METHOD, SECTIONS, Leaf, Manifest
from loaders.errors import CheckpointError, Fault
from loaders.files.new_folder import build_folder, copy_companions, write_json, write_shards
from loaders.files.small_files import CONFIG
from loaders.files.stamps import take_stamps
from loaders.modules.modules import QuantizedModule
from loaders.open import plan_original
from loaders.plan import Plan
from loaders.stream import load_params
from loaders.write import refuse_changes_of
from pallas_kernels.format.spec import LAYOUT_VERSION


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    progress: bool | None = None,
    follow_links: bool = False,
) -> None:
    """Write a copy of a checkpoint that `load_checkpoint` reads without repacking.

    It gives the same arrays, specs and config. It is for this library alone, and for one version of
    the tile layout. It is refused if the source is still at its place and has changed.

    Args:
      source: a checkpoint that `load_checkpoint` reads.
      destination: the folder to make; it must not exist.
      progress: True, False, or None for a bar on a terminal only.
      follow_links: as in `load_checkpoint`.

    Raises:
      CheckpointError: listing every fault of the source, bad scales included; or if it changes
        meanwhile, if it is such a copy itself, or if the destination exists.

    Example:
      ```python
      jaxwna16.convert_checkpoint("path/to/checkpoint", "path/to/converted")
      checkpoint = jaxwna16.load_checkpoint("path/to/converted")
      ```
    """
    refuse_fork(loads=True)
    source = resolve_folder(source)
    before = take_stamps(source)
    plan = plan_original(source, follow_links=follow_links)
    names = list_files(plan.folder, _list_shards(plan))
    with show_bytes(f"converting {plan.folder.name}", visible=progress) as report:
        meter = _Meter(report, plan.nbytes)
        with build_folder(Path(destination)) as folder:
            meter.total += sum((plan.folder / name).stat().st_size for name in names)
            copy_companions(plan.folder, folder, follow_links=follow_links)
            leaves = _write_leaves(plan, folder, meter)
            refuse_changes_of(plan, before)
            fingerprint = take_fingerprint(plan.folder, names, meter.add)
            refuse_changes_of(plan, before)
            write_json(folder / CONFIG, _describe_config(plan.config))
            write_json(folder / MANIFEST, _make_manifest(plan, leaves, fingerprint).describe())


@dataclasses.dataclass
class _Meter:
    """Bytes read so far: once to be converted, and once more for the fingerprint."""

    report: Any
    total: int
    done: int = 0

    def add(self, count: int) -> None:
        self.done += count
        self.report(self.done, self.total, "")


def _list_shards(plan: Plan) -> set[Path]:
    infos = [*plan.plain.values()]
    infos += [info for module in plan.quantized.values() for info in module.tensors.values()]
    return {info.file for info in infos}


def _write_leaves(plan: Plan, folder: Path, meter: _Meter) -> dict[str, Leaf]:
    digests: dict[str, str] = {}

    def list_leaves() -> Iterator[tuple[str, np.ndarray]]:
        faults: list[Fault] = []
        for part in _split(plan):
            try:
                leaves = _flatten(load_params(part))
            except CheckpointError as error:
                faults += error.faults
                continue
            for name, array in leaves.items():
                digests[name] = hash_leaf(array)
                yield name, array
            meter.add(part.nbytes)
        if faults:
            raise CheckpointError(plan.folder, faults)

    files, _ = write_shards(folder, list_leaves(), stem=METHOD)
    described = plan.describe_leaves()
    return {
        name: Leaf(file, np.dtype(described[name].dtype), described[name].shape, digests[name])
        for name, file in files.items()
    }


def _split(plan: Plan) -> Iterator[Plan]:
    """What becomes leaves by itself, in the order of the files: tensors, modules, whole stacks."""
    begun = set()
    for part in plan.list_parts():
        name = part.path if isinstance(part, QuantizedModule) else part.name
        path = plan.places.get(name)
        if path in begun:
            continue
        names, stacks = [name], {}
        if path is not None:
            begun.add(path)
            names, stacks = list(plan.stacks[path].places), {path: plan.stacks[path]}
        quantized = {n: plan.quantized[n] for n in names if n in plan.quantized}
        plain = {n: plan.plain[n] for n in names if n in plan.plain}
        yield dataclasses.replace(plan, quantized=quantized, plain=plain, stacks=stacks)


def _flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, np.ndarray]:
    """The arrays of a nested dict by their paths."""
    leaves: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flatten(value, f"{path}{key}.")
        else:
            leaves[path + key] = np.asarray(value, order="C")
    return leaves


def _describe_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the copy, with a quant_method that vLLM and others stop at."""
    kept = {key: value for key, value in config.items() if key not in SECTIONS}
    return kept | {SECTIONS[0]: {"quant_method": METHOD, "layout_version": LAYOUT_VERSION}}


def _make_manifest(plan: Plan, leaves: Mapping[str, Leaf], fingerprint: Fingerprint) -> Manifest:
    return Manifest(
        release=__version__,
        source=fingerprint,
        quantization={key: plan.config[key] for key in SECTIONS if key in plan.config},
        warnings=plan.warnings,
        specs=plan.specs,
        experts={path: stack.experts for path, stack in plan.stacks.items() if stack.spec},
        leaves=leaves,
    )
