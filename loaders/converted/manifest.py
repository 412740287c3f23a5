"""The manifest of a converted checkpoint, `jaxwna16.json`: what is in it and where it came from.

{
  "format": "jaxwna16 converted checkpoint", "version": 1, "layout_version": 1,
  "jaxwna16": release that wrote it,
  "source": {"folder", "files": {name: {"size", "mtime_ns", "sha256", "header_sha256"}}},
  "quantization": what config.json of the source said of it,
  "warnings": remarks of the loader about the source,
  "modules": {path: {"bits", "group_size", "symmetric", "in_features", "out_features",
                     "experts"}},
  "tensors": {leaf of the params tree: {"file", "dtype", "shape", "sha256"}},
  "sha256": of all this, as JSON with sorted keys and without spaces
}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loaders.converted.fingerprint import FilePrint, Fingerprint
from loaders.errors import CheckpointError, Fault
from loaders.files.folder import INDEX
from loaders.files.safetensors_file import DTYPES
from loaders.files.small_files import CONFIG, read_json
from pallas_kernels.errors import SpecError
from pallas_kernels.format.spec import LAYOUT_VERSION, QuantSpec

MANIFEST = "jaxwna16.json"
METHOD = "jaxwna16"
"""The `quant_method` in config.json of a converted checkpoint, which no other tool knows."""
SECTIONS = ("quantization_config", "compression_config")
_FORMAT = "jaxwna16 converted checkpoint"
_VERSION = 1
_TABLE = {
    "format": (str,),
    "version": (int,),
    "layout_version": (int,),
    "jaxwna16": (str,),
    "source": (dict,),
    "quantization": (dict,),
    "warnings": (list,),
    "modules": (dict,),
    "tensors": (dict,),
    "sha256": (str,),
}
_SOURCE = {"folder": (str,), "files": (dict,)}
_FILE = {"size": (int,), "mtime_ns": (int,), "sha256": (str,), "header_sha256": (str,)}
_MODULE = {
    "bits": (int,),
    "group_size": (int,),
    "symmetric": (bool,),
    "in_features": (int,),
    "out_features": (int,),
    "experts": (int, type(None)),
}
_TENSOR = {"file": (str,), "dtype": (str,), "shape": (list,), "sha256": (str,)}
_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the params tree: its file, dtype, shape, and the SHA-256 of its bytes."""

    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a converted checkpoint holds, and of what.

    Attributes:
      release: version of jaxwna16 that wrote it.
      source: fingerprint of the checkpoint that was converted.
      quantization: the sections of that one's config.json that `SECTIONS` names.
      warnings: remarks of the loader about it.
      specs: path of each quantized module, and of each stack of experts -> its spec.
      experts: path of each stack -> how many.
      leaves: of the params tree, by name.
    """

    release: str
    source: Fingerprint
    quantization: Mapping[str, Any]
    warnings: tuple[str, ...]
    specs: Mapping[str, QuantSpec]
    experts: Mapping[str, int]
    leaves: Mapping[str, Leaf]

    def describe(self) -> dict[str, Any]:
        """The JSON object."""
        fields = ("bits", "group_size", "symmetric", "in_features", "out_features")
        table = {
            "format": _FORMAT,
            "version": _VERSION,
            "layout_version": LAYOUT_VERSION,
            "jaxwna16": self.release,
            "source": dataclasses.asdict(self.source),
            "quantization": dict(self.quantization),
            "warnings": list(self.warnings),
            "modules": {
                path: {field: getattr(spec, field) for field in fields}
                | {"experts": self.experts.get(path)}
                for path, spec in self.specs.items()
            },
            "tensors": {
                name: {
                    "file": leaf.file,
                    "dtype": leaf.dtype.name,
                    "shape": list(leaf.shape),
                    "sha256": leaf.sha256,
                }
                for name, leaf in self.leaves.items()
            },
        }
        return table | {"sha256": hash_table(table)}


def is_converted(folder: Path, *, follow_links: bool = False) -> bool:
    """Whether a folder is, or says that it is, a converted checkpoint."""
    if os.path.lexists(folder / MANIFEST):
        return True
    try:
        return names_method(read_json(folder, CONFIG, follow_links=follow_links))
    except CheckpointError:
        return False  # whatever it is


def names_method(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a converted checkpoint."""
    section = config.get(SECTIONS[0])
    return isinstance(section, dict) and section.get("quant_method") == METHOD


def read_manifest(folder: Path, *, follow_links: bool = False) -> Manifest:
    """Read and check the manifest by itself.

    Raises:
      CheckpointError: if it is missing, of another format or layout, or listing what is wrong.
    """
    if not os.path.lexists(folder / MANIFEST):
        what = f"the file is missing: {CONFIG} says that this is a converted checkpoint"
        raise CheckpointError(folder, [Fault(what, MANIFEST, "", "convert it again")])
    table = read_json(folder, MANIFEST, follow_links=follow_links)
    faults = list(_check_versions(table)) or list(_check_table(table))
    if not faults and hash_table(table) != table["sha256"]:
        faults = [_make_fault("sha256", "it was changed after it was written")]
    if faults:
        raise CheckpointError(folder, faults)
    specs, leaves = {}, {}
    for name, entry in table["modules"].items():
        try:
            specs[name] = _parse_spec(entry)
        except SpecError as error:
            faults.append(_make_fault(name, str(error)))
    for name, entry in table["tensors"].items():
        try:
            leaves[name] = _parse_leaf(entry)
        except ValueError as error:
            faults.append(_make_fault(name, str(error)))
    faults += _check_names(leaves)
    if faults:
        raise CheckpointError(folder, faults)
    files = {name: FilePrint(**entry) for name, entry in table["source"]["files"].items()}
    return Manifest(
        release=table["jaxwna16"],
        source=Fingerprint(table["source"]["folder"], files),
        quantization=table["quantization"],
        warnings=tuple(table["warnings"]),
        specs=specs,
        experts={path: e["experts"] for path, e in table["modules"].items() if e["experts"]},
        leaves=leaves,
    )


def hash_table(table: Mapping[str, Any]) -> str:
    """The SHA-256 that belongs under "sha256"."""
    rest = {key: value for key, value in table.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_versions(table: Mapping[str, Any]) -> Iterator[Fault]:
    """Whether this release can read what follows."""
    if table.get("format") != _FORMAT:
        yield _make_fault(
            "format", f"expected {_FORMAT!r}, found {str(table.get('format'))[:80]!r}"
        )
        return
    version, layout = table.get("version"), table.get("layout_version")
    if type(version) is int and version > _VERSION:
        what = f"this release reads version {_VERSION}, found {version}"
        yield _make_fault("version", what, "install a newer jaxwna16, or convert it again")
    elif type(version) is int and version != _VERSION:
        yield _make_fault("version", f"this release reads version {_VERSION}, found {version}")
    elif type(layout) is int and layout != LAYOUT_VERSION:
        what = f"this release reads tile layout {LAYOUT_VERSION}, found {layout}"
        yield _make_fault("layout_version", what)


def _check_table(table: Mapping[str, Any]) -> Iterator[Fault]:
    """What is missing or of another kind, down to the last value."""
    yield from (faults := list(_check_types("", table, _TABLE)))
    if faults:
        return
    if not all(isinstance(warning, str) for warning in table["warnings"]):
        yield _make_fault("warnings", "expected texts")
    if unknown := table["quantization"].keys() - set(SECTIONS):
        yield _make_fault("quantization", f"expected {' or '.join(SECTIONS)}, found {unknown}")
    yield from (faults := list(_check_types("source", table["source"], _SOURCE)))
    if not faults:
        for name, entry in table["source"]["files"].items():
            yield from _check_types(f"source.files.{name}", entry, _FILE)
            # whatever it says is looked at outside of the folder: nothing but checkpoints may be
            known = name in (CONFIG, INDEX) or name.endswith(".safetensors")
            if Path(name).name != name or not known:
                yield _make_fault("source.files", f"{name!r} is no file of a checkpoint")
    for path, entry in table["modules"].items():
        yield from _check_types(path, entry, _MODULE)
    for name, entry in table["tensors"].items():
        yield from _check_types(name, entry, _TENSOR)


def _check_types(
    where: str, table: object, kinds: Mapping[str, tuple[type, ...]]
) -> Iterator[Fault]:
    if not isinstance(table, dict):
        yield _make_fault(where, f"expected an object, found {type(table).__name__}")
        return
    for key, kind in kinds.items():
        name = f"{where}.{key}" if where else key
        if key not in table:
            yield _make_fault(name, "the key is missing")
        elif type(table[key]) not in kind:
            expected = " or ".join(k.__name__ for k in kind)
            yield _make_fault(name, f"expected {expected}, found {type(table[key]).__name__}")
    for key in table.keys() - kinds.keys():
        yield _make_fault(f"{where}.{key}" if where else key, "the key is unknown")


def _parse_spec(entry: Mapping[str, Any]) -> QuantSpec:
    experts = entry["experts"]
    if experts is not None and experts < 1:
        raise SpecError(f"expected at least one expert, found {experts}")
    return QuantSpec(**{key: value for key, value in entry.items() if key != "experts"})


def _parse_leaf(entry: Mapping[str, Any]) -> Leaf:
    file, dtype, shape = entry["file"], entry["dtype"], entry["shape"]
    if any(c in file for c in "/\\\0") or not file.endswith(".safetensors"):
        raise ValueError(f"expected the name of a safetensors file, found {file!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("shape: expected sizes")
    return Leaf(file, _DTYPES[dtype], tuple(shape), entry["sha256"])


def _check_names(leaves: Mapping[str, Leaf]) -> Iterator[Fault]:
    """The faults of leaves whose names are also paths of other leaves."""
    for name in leaves:
        path = name
        while path := path.rpartition(".")[0]:
            if path in leaves:
                yield _make_fault(path, "this is the name of a tensor and the path of others")


def _make_fault(where: str, what: str, way_out: str = "convert it again") -> Fault:
    return Fault(what, MANIFEST, where, way_out)
