"""The plan of a checkpoint: every module with its scheme and tensors, before any weight is read.

Only config.json, the headers and the small `weight_shape` tensors are read, so a plan of a 100 GB
checkpoint takes a second. All faults of all modules come in one error.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from loaders.errors import CheckpointError, Fault, join_alike, list_first, shorten, suggest
from loaders.files.folder import Scan, list_remarks, read_config, scan_tensors
from loaders.files.safetensors_file import TensorInfo
from loaders.grouping import Grouped, group_tensors, leave_out, list_parents
from loaders.modules.awq_gptq_modules import is_transposed, plan_transposed
from loaders.modules.experts import (
    Member,
    Stack,
    are_stacked,
    describe_mixed,
    holds_gate_and_up,
    name_layer,
    name_slices,
    plan_stacks,
    split_name,
)
from loaders.modules.kv_cache import describe_cache_scales
from loaders.modules.modules import QuantizedModule, plan_modules, split_experts
from loaders.modules.sizes import find_sizes
from loaders.schemes.config_groups import Scheme
from loaders.schemes.module_names import list_prefixes
from loaders.schemes.patterns.patterns import check_count
from loaders.schemes.quantization_config import Quantization, parse_quantization
from loaders.schemes.subconfigs import are_tied
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import make_abstract

MOST_WARNINGS = 200
_MEND = "quantize the model again, or correct config.json if that is wrong"


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
      follow_links: whether files were read that are links which leave the folder.
    """

    folder: Path
    config: Mapping[str, Any]
    quantized: Mapping[str, QuantizedModule]
    plain: Mapping[str, TensorInfo]
    stacks: Mapping[str, Stack]
    warnings: tuple[str, ...] = ()
    follow_links: bool = False

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(part.nbytes for part in [*self.quantized.values(), *self.plain.values()])

    @functools.cached_property
    def specs(self) -> Mapping[str, QuantSpec]:
        """Path -> spec of each quantized module, and of each stack in place of its experts."""
        specs = {p: m.spec for p, m in self.quantized.items() if p not in self.places}
        return specs | {p: s.spec for p, s in self.stacks.items() if s.spec is not None}

    @functools.cached_property
    def places(self) -> dict[str, str]:
        """Each module (by path) and tensor (by name) that is part of a stack -> its path."""
        return {name: path for path, stack in self.stacks.items() for name in stack.places}

    @functools.cached_property
    def expanded(self) -> frozenset[str]:
        """Paths of packed experts that are floats in the tree, since others of their stack are."""
        floats = {path for path, stack in self.stacks.items() if stack.spec is None}
        return frozenset(p for p in self.quantized if self.places.get(p) in floats)

    def describe_leaves(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Path -> shape and dtype of every leaf of the params tree that the plan will become."""
        return self._described

    @functools.cached_property
    def _described(self) -> Mapping[str, jax.ShapeDtypeStruct]:
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
                trees[path] = make_abstract(
                    module.spec, scale.dtype, bias_dtype, act_order=module.encoding.reordered
                )
        return leaves | {
            f"{p}.{name}": leaf for p, tree in trees.items() for name, leaf in tree.items()
        }

    def list_parts(self) -> Iterator[QuantizedModule | TensorInfo]:
        """The modules and tensors in the order in which they lie in the files."""
        parts = [*self.quantized.values(), *self.plain.values()]
        yield from sorted(parts, key=_locate)


@dataclasses.dataclass(frozen=True)
class Survey:
    """As much of a plan as can be made of a checkpoint, and everything that is wrong with it.

    Attributes:
      plan: what could be planned: everything, if there are no faults.
      faults: of the config, the files and the modules.
      unplanned: tensors of modules with faults, by name.
      absent: tensors that the index names and no file has, with the file that should.
      unsound: names of the files of which nothing but the header should be read.
      incomplete: paths under which the plan lacks something because of a fault.
    """

    plan: Plan
    faults: tuple[Fault, ...] = ()
    unplanned: Mapping[str, TensorInfo] = dataclasses.field(default_factory=dict)
    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unsound: frozenset[str] = frozenset()
    incomplete: frozenset[str] = frozenset()


def make_plan(folder: str | Path, *, follow_links: bool = False) -> Plan:
    """Plan a checkpoint folder.

    Args:
      folder: the checkpoint folder.
      follow_links: read files also where they are links that leave the folder.

    Raises:
      CheckpointError: listing every fault of the config, the files and the modules.
    """
    survey = survey_folder(folder, follow_links=follow_links)
    if survey.faults:
        raise CheckpointError(survey.plan.folder, survey.faults)
    return survey.plan


def survey_folder(
    folder: str | Path, *, headers_only: bool = False, follow_links: bool = False
) -> Survey:
    """Plan as much of a checkpoint folder as can be planned.

    Args:
      folder: the checkpoint folder.
      headers_only: leave `weight_shape` unread where the headers tell what it must hold.
      follow_links: as in `make_plan`.

    Raises:
      CheckpointError: if there is no folder, no config.json, or no file in it with a header.
    """
    folder = Path(folder)
    config = read_config(folder, follow_links=follow_links)
    quantization, faults = parse_quantization(config)
    scan = _scan(folder, faults, follow_links)
    if many := check_count(quantization.pattern_count, scan.tensors):
        raise CheckpointError(folder, [*faults, *many])
    torn = {split_name(name)[0] for name in scan.absent}
    grouped = group_tensors(scan.tensors, config, quantization)
    is_clear = not faults and not grouped.refused
    unread = grouped.packed.keys() & torn if is_clear else grouped.packed.keys()
    schemes = {p: quantization.find_scheme(p) for p in grouped.packed if p not in unread}
    sizes = find_sizes(grouped.packed, schemes, headers_only=headers_only, unsound=scan.unsound)
    planned = _plan_members(grouped, unread, schemes, sizes, quantization.version)
    stacked = _stack_members(planned.members, config, torn) if is_clear else _Stacked()
    plan = _join(folder, config, planned.members, stacked.stacks, follow_links)
    warnings = _list_warnings(plan, quantization, grouped, scan, torn)
    faults = [*faults, *scan.faults, *grouped.refused, *grouped.clashes, *planned.faults]
    faults += [*stacked.faults, *_list_in_the_way(scan.tensors, stacked.stacks)]
    return Survey(
        dataclasses.replace(plan, warnings=warnings),
        tuple(join_alike(suggest(faults, _MEND))),
        {i.name: i for path in planned.broken for i in grouped.by_module[path].values()},
        scan.absent,
        scan.unsound,
        frozenset({*planned.broken, *torn, *stacked.cut}),
    )


@dataclasses.dataclass(frozen=True)
class _Planned:
    """All modules by path, those with faults as empty ones; the faults, and whose they are."""

    members: dict[str, Member]
    faults: list[Fault]
    broken: list[str]


@dataclasses.dataclass(frozen=True)
class _Stacked:
    """Experts by the path of their stack; the faults, and the paths of layers that have some."""

    stacks: Mapping[str, Stack] = dataclasses.field(default_factory=dict)
    faults: Sequence[Fault] = ()
    cut: Collection[str] = ()


def _scan(folder: Path, faults: list[Fault], follow_links: bool) -> Scan:
    """The files; without any that can be read, they and `faults` are raised."""
    try:
        scan = scan_tensors(folder, follow_links=follow_links)
    except CheckpointError as error:
        raise CheckpointError(folder, [*faults, *error.faults]) from None
    if scan.faults and not scan.tensors:
        raise CheckpointError(folder, [*faults, *scan.faults])
    return scan


def _plan_members(
    grouped: Grouped,
    unread: Collection[str],
    schemes: Mapping[str, Scheme | None],
    sizes: Mapping[str, np.ndarray],
    version: str,
) -> _Planned:
    """Plan all modules; those that hold all experts of a layer are taken apart.

    Args:
      grouped: their tensors by role.
      unread: paths of the packed ones of which too little is known; they are left out.
      schemes: those of the other packed ones, by path.
      sizes: what `weight_shape` of these holds, by path.
      version: of the compressed-tensors that wrote them, or "".
    """
    members: dict[str, Member] = {}
    faults: list[Fault] = []
    broken: list[str] = []
    for path, found in leave_out(grouped.by_module, {*unread, *grouped.others}).items():
        try:
            members |= _plan_module(path, found, schemes, sizes, version)
        except CheckpointError as error:
            faults += error.faults
            broken.append(path)
            members |= {name: {} for name in _name_parts(path, found)}
    for path in grouped.others:
        members |= {name: {} for name in _name_parts(path, grouped.by_module[path])}
    return _Planned(members, faults, [*broken, *unread, *grouped.others])


def _plan_module(
    path: str,
    found: dict[str, TensorInfo],
    schemes: Mapping[str, Scheme | None],
    sizes: Mapping[str, np.ndarray],
    version: str,
) -> dict[str, Member]:
    """One module, or the experts that it holds; arguments as `_plan_members`."""
    stacked = are_stacked(path, found)
    if path in schemes and is_transposed(found):
        return {path: plan_transposed(path, found, schemes[path])}
    if path in schemes:
        modules = plan_modules(
            path,
            found,
            sizes.get(path),
            schemes[path],
            version=version,
            stacked=stacked,
            joint=stacked and holds_gate_and_up(path),
        )
        return {module.path: module for module in modules}
    if stacked:
        return {f"{path}[{i}]": held for i, held in enumerate(split_experts(found))}
    return {path: found}


def _stack_members(
    members: Mapping[str, Member], config: Mapping[str, Any], torn: Collection[str]
) -> _Stacked:
    """Stack the experts; `torn` are paths of modules that lack tensors, since a file is absent."""
    stacks, faults = plan_stacks(members, config)
    cut = {name for fault in faults if (name := name_layer(fault.tensor))}
    # a file that is absent has a fault of its own
    above = list_parents({path.rpartition(".")[0] for path in torn})
    faults = [fault for fault in faults if fault.tensor not in above]
    return _Stacked(stacks, faults, cut)


def _join(
    folder: Path,
    config: Mapping[str, Any],
    members: Mapping[str, Member],
    stacks: Mapping[str, Stack],
    follow_links: bool,
) -> Plan:
    """The plan of all modules, without its warnings."""
    quantized = {p: m for p, m in members.items() if isinstance(m, QuantizedModule)}
    plain = {
        info.name: info
        for member in members.values()
        if not isinstance(member, QuantizedModule)
        for info in member.values()
    }
    return Plan(folder, config, quantized, plain, stacks, follow_links=follow_links)


def _list_warnings(
    plan: Plan, quantization: Quantization, grouped: Grouped, scan: Scan, torn: Collection[str]
) -> tuple[str, ...]:
    """What is odd, but not a fault."""
    # a tied head is a module without tensors, and some classes tie it unless told otherwise
    head = [] if are_tied(plan.config) is False else ["lm_head"]
    warnings = [
        *grouped.remarks,
        *quantization.describe_unused({*grouped.by_module, *torn, *head}),
        *list_remarks(plan.folder, plan.config, {info.file for info in scan.tensors.values()}),
        *_list_absent_zero_points(plan.quantized),
        *_list_short_groups(plan.quantized),
        *describe_mixed(plan.stacks, plan.quantized),
        *describe_cache_scales(grouped.cache_scales),
    ]
    return tuple(list_first(warnings, MOST_WARNINGS))


def _list_in_the_way(tensors: Mapping[str, TensorInfo], stacks: Mapping[str, Stack]) -> list[Fault]:
    if stacks.keys().isdisjoint(list_parents(tensors)):
        return []
    return [
        Fault("lies at the path of the experts' stack", info.file.name, name)
        for name, info in tensors.items()
        if not stacks.keys().isdisjoint(list_prefixes(name))
    ]


def _list_absent_zero_points(modules: Mapping[str, QuantizedModule]) -> list[str]:
    absent = [path for path, m in modules.items() if m.encoding.zero_points == "zeros"]
    if not absent:
        return []
    more = f" and {len(absent) - 1} more modules" if len(absent) > 1 else ""
    return [
        f"{absent[0]}{more}: no zero points; compressed-tensors before 0.9.4 left them out if all "
        "were 0, so they are read as 0"
    ]


def _list_short_groups(modules: Mapping[str, QuantizedModule]) -> list[str]:
    """One remark for the modules of each K."""
    alike: dict[tuple[int, int], list[str]] = defaultdict(list)
    for path, module in modules.items():
        if module.encoding.group_size is not None:
            alike[module.spec.in_features, module.group_size].append(path)
    return [
        f"{', '.join(shorten(paths))}: {k} input features are no multiple of group_size = {size}, "
        f"so that the last group is read as one of {k % size}"
        for (k, size), paths in alike.items()
    ]


def _name_parts(path: str, found: Mapping[str, TensorInfo]) -> list[str]:
    """A module's path; or those of the experts that it holds."""
    return name_slices(path, found) if are_stacked(path, found) else [path]


def _locate(part: QuantizedModule | TensorInfo) -> tuple[str, int]:
    first = part if isinstance(part, TensorInfo) else part.tensors["weight_packed"]
    return first.file.name, first.start
