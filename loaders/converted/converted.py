"""A converted checkpoint: the leaves of the params tree as they are computed with.

Its safetensors files hold the leaves under their names in the tree, "….q_proj.packed" and so on, an
expert stack as one tensor. Beside them are a manifest (`loaders.converted.manifest`) and a
config.json whose quant_method other tools refuse. Loading is reading: into aligned buffers, which
XLA takes as they are on a CPU, and two at a time. Memory bound on the host, beside the arrays that
are returned: on a CPU nothing, elsewhere the two largest leaves.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from loaders.converted.fingerprint import check_source
from loaders.converted.manifest import (
    MANIFEST,
    SECTIONS,
    Manifest,
    names_method,
    read_manifest,
)
from loaders.errors import CheckpointError, Fault, list_first
from loaders.files.folder import read_config
from loaders.files.safetensors_file import TensorInfo, read_header, read_tensor, read_tensors
from loaders.files.small_files import CONFIG, check_file
from loaders.modules.encoding import Encoding
from loaders.modules.experts import Stack
from loaders.modules.modules import QuantizedModule
from loaders.modules.repack import pack
from loaders.plan import MOST_WARNINGS, Plan
from loaders.schemes.packings import TILES
from loaders.stream import Progress, place_tensor, put_leaf, require_memory_for
from pallas_kernels.errors import SpecError
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import check_weights

_READERS = 2
_AGAIN = "convert it again"
# leaf of a packed weight -> the role that a tensor with the same numbers has in an original
_ROLES = {
    "packed": "weight_packed",
    "scale": "weight_scale",
    "zero_point": "weight_zero_point",
    "perm": "weight_g_idx",
    "bias": "bias",
}


@dataclasses.dataclass(frozen=True)
class ConvertedPlan(Plan):
    """What a converted checkpoint holds, in the terms of an original one.

    `quantized` has the experts of a stack one by one ("….experts.w13[0]"), and each module's
    leaves by the roles that their originals have. `plain` has all other leaves, stacks of float
    experts as one. `config` is the original's.

    Attributes:
      digests: name of each leaf -> SHA-256 of its bytes.
      source: the folder that was converted.
    """

    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    source: str = ""

    @functools.cached_property
    def leaves(self) -> dict[str, TensorInfo]:
        """Where each leaf of the params tree lies, in the order of the files."""
        found = list(self.plain.values())
        for path, module in self.quantized.items():
            if path not in self.places:
                found += module.tensors.values()
        for path, stack in self.stacks.items():
            for info in self.quantized[f"{path}[0]"].tensors.values():
                shape = (stack.experts, *info.shape)
                name = info.name.removesuffix("[0]")
                found.append(dataclasses.replace(info, name=name, shape=shape))
        return {i.name: i for i in sorted(found, key=lambda i: (i.file.name, i.start))}

    @functools.cached_property
    def _described(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct(info.shape, info.dtype) for name, info in self.leaves.items()
        }


def load_leaves(
    plan: ConvertedPlan,
    *,
    dtype: Any = None,
    kept: Collection[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read a converted checkpoint; the same tree, bit for bit, as `load_params` of its source.

    Args:
      plan: what to read.
      dtype: float dtype to which tensors that are not quantized are cast; None leaves them as they
        are.
      kept: names of tensors that stay as they are, whatever `dtype` is.
      progress: told of the bytes read.

    Raises:
      CheckpointError: listing the tensors with values too large for `dtype`; or if a file ends
        early; or, before anything is read, if the arrays cannot fit into memory.
    """
    require_memory_for(plan, dtype)
    params: dict[str, Any] = {}
    faults: list[Fault] = []
    done, total, specs = 0, plan.nbytes, plan.specs
    for info, array in read_leaves(plan):
        path, _, leaf = info.name.rpartition(".")
        is_packed = path in specs and leaf != "bias"
        wanted = None if is_packed or info.name in kept else dtype
        value, overflows = place_tensor(array, wanted, info)
        put_leaf(params, info.name, value)
        faults += overflows
        done += info.nbytes
        if progress is not None:
            progress(done, total, info.name)
    if faults:
        raise CheckpointError(plan.folder, faults)
    return params


def read_leaves(plan: ConvertedPlan) -> Iterator[tuple[TensorInfo, np.ndarray]]:
    """Yield every leaf with its array, in the order of the files; threads read ahead.

    Raises:
      CheckpointError: if a file ends early.
    """
    leaves = plan.leaves.values()
    # in bytes, since a reader must not wait for a large leaf when the next ones are small
    free = _READERS * max((info.nbytes for info in leaves), default=0)
    with ThreadPoolExecutor(_READERS) as readers:
        coming: collections.deque[tuple[TensorInfo, Future[np.ndarray]]] = collections.deque()
        for info in leaves:
            while info.nbytes > free:
                first, reading = coming.popleft()
                yield first, reading.result()
                free += first.nbytes
            coming.append((info, readers.submit(read_tensor, info)))
            free -= info.nbytes
        for first, reading in coming:
            yield first, reading.result()


def read_weights(module: QuantizedModule) -> dict[str, Any]:
    """The leaf dict of one module, of a converted checkpoint or an original one.

    Raises:
      CheckpointError: if a file ends early.
    """
    arrays = dict(zip(module.tensors, read_tensors(module.tensors.values()), strict=True))
    if module.encoding.words != TILES:
        return pack(arrays, module.spec, module.encoding)
    return {leaf: arrays[role] for leaf, role in _ROLES.items() if role in arrays}


def check_leaf(plan: ConvertedPlan, info: TensorInfo, array: np.ndarray) -> list[Fault]:
    """The fault of a leaf whose bytes are not those that were written."""
    if hash_leaf(array) == plan.digests[info.name]:
        return []
    what = f"{MANIFEST} says that other numbers were written"
    return [Fault(what, info.file.name, info.name, _AGAIN)]


def hash_leaf(array: np.ndarray) -> str:
    """SHA-256 of the bytes of a contiguous array."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def plan_converted(folder: Path, *, follow_links: bool = False) -> ConvertedPlan:
    """Plan a converted checkpoint; `follow_links` as in `make_plan`.

    Raises:
      CheckpointError: listing every fault of the manifest, the files and their source.
    """
    config = read_config(folder, follow_links=follow_links)
    manifest = read_manifest(folder, follow_links=follow_links)
    faults = []
    if not names_method(config):
        what = f"is not that of a converted checkpoint, though {MANIFEST} lies beside it"
        faults.append(Fault(what, CONFIG, f"{SECTIONS[0]}.quant_method", _AGAIN))
    infos, wrong = _read_headers(folder, manifest, follow_links)
    faults += wrong
    changes, remarks = check_source(manifest.source, MANIFEST)
    faults += changes
    if faults:
        raise CheckpointError(folder, faults)
    quantized: dict[str, QuantizedModule] = {}
    stacks: dict[str, Stack] = {}
    for path, spec in manifest.specs.items():
        held = {name: infos.pop(f"{path}.{name}") for name in _list_leaves(path, infos)}
        experts = manifest.experts.get(path)
        try:
            check_weights(_describe(held), spec, experts)
        except SpecError as error:
            faults.append(Fault(str(error), MANIFEST, path, _AGAIN))
            continue
        encoding = Encoding(
            bits=spec.bits,
            words=TILES,
            zero_points="none" if spec.symmetric else "bytes",
            reordered="perm" in held,
        )
        make = functools.partial(_make_module, spec=spec, encoding=encoding)
        if experts is None:
            quantized[path] = make(path, held)
        else:
            split = {name: info.split() for name, info in held.items()}
            places = {f"{path}[{i}]": (i, 0) for i in range(experts)}
            quantized |= {
                name: make(name, {leaf: parts[i] for leaf, parts in split.items()})
                for name, (i, _) in places.items()
            }
            stacks[path] = Stack(experts, spec, _describe(held), places)
    if faults:
        raise CheckpointError(folder, faults)
    original = {key: value for key, value in config.items() if key not in SECTIONS}
    return ConvertedPlan(
        folder,
        original | dict(manifest.quantization),
        quantized,
        infos,
        stacks,
        tuple(list_first([*manifest.warnings, *remarks], MOST_WARNINGS)),
        follow_links=follow_links,
        digests={name: leaf.sha256 for name, leaf in manifest.leaves.items()},
        source=manifest.source.folder,
    )


def _read_headers(
    folder: Path, manifest: Manifest, follow_links: bool
) -> tuple[dict[str, TensorInfo], list[Fault]]:
    """The tensors of the files that the manifest names, and where it and they disagree."""
    infos: dict[str, TensorInfo] = {}
    faults: list[Fault] = []
    unread = set()
    for file in sorted({leaf.file for leaf in manifest.leaves.values()}):
        try:
            header = read_header(check_file(folder, file, follow_links=follow_links))
        except CheckpointError as error:
            faults += error.faults
            unread.add(file)
            continue
        faults += [
            Fault(f"{MANIFEST} says it is in one file, it is in two", file, name, _AGAIN)
            for name in header.keys() & infos.keys()
        ]
        infos |= header
    for name, leaf in manifest.leaves.items():
        info = infos.get(name)
        if leaf.file in unread:
            continue
        if info is None or info.file.name != leaf.file:
            faults.append(Fault(f"{MANIFEST} says it is there", leaf.file, name, _AGAIN))
        elif (info.dtype, info.shape) != (leaf.dtype, leaf.shape):
            what = (
                f"{MANIFEST} says {leaf.dtype.name} {list(leaf.shape)}, "
                f"found {info.dtype.name} {list(info.shape)}"
            )
            faults.append(Fault(what, leaf.file, name, _AGAIN))
    faults += [
        Fault(f"{MANIFEST} does not say it is there", infos[name].file.name, name, _AGAIN)
        for name in infos.keys() - manifest.leaves.keys()
    ]
    return infos, faults


def _list_leaves(path: str, infos: Mapping[str, TensorInfo]) -> list[str]:
    return [name for name in _ROLES if f"{path}.{name}" in infos]


def _describe(infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    return {name: jax.ShapeDtypeStruct(i.shape, i.dtype) for name, i in infos.items()}


def _make_module(
    path: str, held: Mapping[str, TensorInfo], *, spec: QuantSpec, encoding: Encoding
) -> QuantizedModule:
    return QuantizedModule(path, spec, {_ROLES[n]: info for n, info in held.items()}, encoding)
