"""Tensors by module, with roles that are the same forevery tool, before any module is planned."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from loaders.errors import Fault
from loaders.files.safetensors_file import TensorInfo
from loaders.modules.awq_gptq_modules import name_roles
from loaders.modules.experts import split_name
from loaders.modules.kv_cache import split_cache_scales
from loaders.modules.modules import ROLES
from loaders.modules.other_numbers import find_other_numbers, list_other_numbers
from loaders.schemes.quantization_config import Quantization, says_quantization


@dataclasses.dataclass(frozen=True)
class Grouped:
    """The tensors of a checkpoint by module.

    Attributes:
      by_module: path of each module -> its tensors by role, in the order of the files.
      others: path of each module whose numbers cannot be read -> what they are.
      cache_scales: names of scales of a quantized cache, which are of no module.
      refused: faults of groups that cannot be read and have modules.
      clashes: faults of names, of roles and of other numbers.
      remarks: on groups that cannot be read and have no modules.
    """

    by_module: Mapping[str, dict[str, TensorInfo]]
    others: Mapping[str, str]
    cache_scales: Collection[str]
    refused: Collection[Fault]
    clashes: Collection[Fault]
    remarks: Collection[str]

    @functools.cached_property
    def packed(self) -> dict[str, dict[str, TensorInfo]]:
        """The modules with tensors that only packed ones have."""
        return {
            path: found
            for path, found in self.by_module.items()
            if path not in self.others and not found.keys().isdisjoint(ROLES)
        }


def group_tensors(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], quantization: Quantization
) -> Grouped:
    """Group all tensors of a checkpoint; `quantization` is what its config.json says of it."""
    is_quantized = says_quantization(config)
    tensors, cache_scales = split_cache_scales(tensors) if is_quantized else (tensors, [])
    by_module, clashes = _group_by_module(tensors)
    others = find_other_numbers(by_module, quantized=is_quantized)
    named, misnamed = name_roles(leave_out(by_module, others), quantization)
    by_module |= named
    refused, remarks = quantization.check_groups(by_module)
    unsaid = {path: kind for path, kind in others.items() if not quantization.refuses(path)}
    clashes = [*clashes, *misnamed, *list_other_numbers(unsaid, by_module)]
    return Grouped(by_module, others, cache_scales, refused, clashes, remarks)


def _group_by_module(
    tensors: Mapping[str, TensorInfo],
) -> tuple[dict[str, dict[str, TensorInfo]], list[Fault]]:
    """Module path -> its tensors by role, in the order of the files."""
    parents = list_parents({name.rpartition(".")[0] for name in tensors})
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


def list_parents(paths: Iterable[str]) -> set[str]:
    """All of `list_prefixes` of all paths."""
    parents: set[str] = set()
    for path in paths:
        while path and path not in parents:
            parents.add(path)
            path = path.rpartition(".")[0]
    return parents


def leave_out(
    by_module: Mapping[str, dict[str, TensorInfo]], paths: Collection[str]
) -> dict[str, dict[str, TensorInfo]]:
    """The modules that are not among `paths`."""
    return {path: found for path, found in by_module.items() if path not in paths}
