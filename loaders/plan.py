"""The plan of a checkpoint: every module with its scheme and tensors, before any weight is read.

Only config.json, the headers and the small `weight_shape` tensors are read, so a plan of a 100 GB
checkpoint takes a second. All faults of all modules come in one error.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from loaders.errors import CheckpointError, Fault
from loaders.experts import Member, Stack, are_stacked, name_slices, plan_stacks, split_name
from loaders.folder import list_tensors, read_config
from loaders.modules import ROLES, QuantizedModule, plan_modules, split_experts
from loaders.quantization_config import QuantizationConfig, parse_quantization
from loaders.safetensors_file import TensorInfo, read_tensors
from pallas_kernels.spec import QuantSpec
from pallas_kernels.weights import make_abstract

_MAX_SHAPE_BYTES = 1 << 16  # [E, 4] int64 for 2048 experts


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a checkpoint holds.

    Attributes:
      folder: the checkpoint folder.
      config: config.json.
      quantized: the quantized modules by path, in the order of the files. Experts are modules by
        themselves, those of a stacked module as "….experts.down_proj[0]" and so on.
      plain: all other tensors by name, in the order of the files; stacked experts one by one, too.
      stacks: what experts become, by path: "….experts.w13" and "….experts.w2".
      warnings: remarks that are no faults, one sentence each.
    """

    folder: Path
    config: Mapping[str, Any]
    quantized: Mapping[str, QuantizedModule]
    plain: Mapping[str, TensorInfo]
    stacks: Mapping[str, Stack]
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(part.nbytes for part in self.list_parts())

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """Path -> spec of each quantized module, and of each stack in place of its experts."""
        specs = {p: m.spec for p, m in self.quantized.items() if p not in self.places}
        return specs | {p: s.spec for p, s in self.stacks.items() if s.spec is not None}

    @functools.cached_property
    def places(self) -> dict[str, str]:
        """Each module (by path) and tensor (by name) that is part of a stack -> its path."""
        return {name: path for path, stack in self.stacks.items() for name in stack.places}

    def describe_leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path -> shape and dtype of every leaf of the params tree that the plan will become."""
        leaves = {
            info.name: jax.ShapeDtypeStruct(info.shape, info.dtype)
            for info in self.plain.values()
            if info.name not in self.places
        }
        trees = {path: stack.leaves for path, stack in self.stacks.items()}
        for path, module in self.quantized.items():
            if path not in self.places:
                bias, scale = module.tensors.get("bias"), module.tensors["weight_scale"]
                bias_dtype = None if bias is None else bias.dtype
                trees[path] = make_abstract(module.spec, scale.dtype, bias_dtype)
        return leaves | {
            f"{p}.{name}": leaf for p, tree in trees.items() for name, leaf in tree.items()
        }

    def list_parts(self) -> Iterator[QuantizedModule | TensorInfo]:
        """The modules and tensors in the order in which they lie in the files."""
        parts = [*self.quantized.values(), *self.plain.values()]
        yield from sorted(parts, key=_locate)


def make_plan(folder: str | Path) -> Plan:
    """Plan a checkpoint folder.

    Raises:
      CheckpointError: listing every fault of the config, the files and the modules.
    """
    folder = Path(folder)
    config = read_config(folder)
    quantization, faults = parse_quantization(config)
    try:
        tensors = list_tensors(folder)
    except CheckpointError as error:
        raise CheckpointError(folder, [*faults, *error.faults]) from None
    if faults:
        raise CheckpointError(folder, faults)
    by_module, faults = _group_by_module(tensors)
    members, wrong = _plan_members(by_module, quantization)
    faults += wrong
    stacks, wrong = plan_stacks(members, config)
    faults += wrong
    faults += [
        Fault("stands where the stack of the experts goes", info.file.name, info.name)
        for path, found in by_module.items()
        for info in found.values()
        if info.name in stacks or not stacks.keys().isdisjoint(_list_prefixes(path))
    ]
    if faults:
        raise CheckpointError(folder, faults)
    quantized = {p: m for p, m in members.items() if isinstance(m, QuantizedModule)}
    plain = {
        info.name: info
        for member in members.values()
        if not isinstance(member, QuantizedModule)
        for info in member.values()
    }
    modules = set(by_module) | ({"lm_head"} if config.get("tie_word_embeddings") else set())
    warnings = tuple(
        f"config.json: pattern {pattern!r} matches no module"
        for pattern in quantization.list_unused(modules)
    )
    return Plan(folder, config, quantized, plain, stacks, warnings)


def _group_by_module(
    tensors: Mapping[str, TensorInfo],
) -> tuple[dict[str, dict[str, TensorInfo]], list[Fault]]:
    """Module path -> its tensors by role, in the order of the files."""
    paths = {name.rpartition(".")[0] for name in tensors}
    parents = {prefix for path in paths for prefix in _list_prefixes(path)}
    faults = [
        Fault("this is the name of a tensor and the path of others", info.file.name, name)
        for name, info in tensors.items()
        if name in parents
    ]
    by_module: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        path, role = split_name(name)
        other = by_module[path].setdefault(role, info)
        if other is not info:
            faults.append(Fault(f"is also there as {other.name}", info.file.name, name))
    return by_module, faults


def _plan_members(
    by_module: Mapping[str, dict[str, TensorInfo]], config: QuantizationConfig
) -> tuple[dict[str, Member], list[Fault]]:
    """All modules; those that hold all experts of a layer are taken apart."""
    packed = {p: found for p, found in by_module.items() if not found.keys().isdisjoint(ROLES)}
    sizes = _read_sizes(packed)
    members: dict[str, Member] = {}
    faults: list[Fault] = []
    for path, found in by_module.items():
        stacked = are_stacked(path, found)
        try:
            if path in packed:
                scheme = config.find_scheme(path)
                modules = plan_modules(path, found, sizes.get(path), scheme, stacked=stacked)
                members |= {module.path: module for module in modules}
            elif stacked:
                members |= {f"{path}[{i}]": held for i, held in enumerate(split_experts(found))}
            else:
                members[path] = found
        except CheckpointError as error:
            faults += error.faults
            names = name_slices(path, found) if stacked else [path]
            members |= {name: {} for name in names}
    return members, faults


def _read_sizes(packed: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, np.ndarray]:
    """What the `weight_shape` of each module holds, where it is not too large to be one."""
    infos = {
        path: found["weight_shape"] for path, found in packed.items() if "weight_shape" in found
    }
    infos = {path: info for path, info in infos.items() if info.nbytes <= _MAX_SHAPE_BYTES}
    return dict(zip(infos, read_tensors(infos.values()), strict=True))


def _list_prefixes(path: str) -> Iterator[str]:
    """The path itself and the paths of its parents: "a.b" -> "a.b", "a"."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _locate(part: QuantizedModule | TensorInfo) -> tuple[str, int]:
    first = part if isinstance(part, TensorInfo) else part.tensors["weight_packed"]
    return first.file.name, first.start
