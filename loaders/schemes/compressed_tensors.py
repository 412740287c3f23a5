"""`quantization_config` of compressed-tensors -> which scheme each module has.

Configs are resolved as compressed-tensors 0.20 does it (`utils/match.py`): an exact name before a
regular expression before a class name, whatever the order of the groups; of several patterns the
alphabetically first; `re:` patterns are anchored at the start only; what is ignored is not
quantized, whatever targets it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from loaders.errors import Fault
from loaders.files.safetensors_file import TensorInfo
from loaders.schemes.config_groups import (
    FILE,
    MEND,
    REQUANTIZE,
    SECTION,
    Refusal,
    Scheme,
    parse_group,
)
from loaders.schemes.module_names import describe_modules, list_prefixes, name_classes, star_numbers
from loaders.schemes.patterns.patterns import (
    Budget,
    Pattern,
    check_distinct,
    compile_pattern,
    make_budget,
)

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_ATTENTION = re.compile(r".*attn|.*attention")


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """What config.json says of the weights; empty where nothing is quantized.

    Attributes:
      targets: each target and what its group asks for: a scheme, None (weights stay plain), or
        what cannot be read.
      ignore: names, patterns and classes of what is not quantized.
      version: of the compressed-tensors that wrote the config, or "".
      remarks: what is odd, but no fault.
      absent: how config.json lacks the section ("is null"), "" if it has it.
    """

    targets: tuple[tuple[str, Scheme | Refusal | None], ...] = ()
    ignore: tuple[str, ...] = ()
    version: str = ""
    remarks: tuple[str, ...] = ()
    absent: str = dataclasses.field(default="", compare=False)

    def find_scheme(self, module: str) -> Scheme | None:
        """The scheme of a module, or None where it is ignored or no target matches."""
        found = self._find_group(module, name_classes(module))
        return found if isinstance(found, Scheme) else None

    def refuses(self, module: str) -> bool:
        """Whether the module is in a group that cannot be read."""
        return isinstance(self._find_group(module, name_classes(module)), Refusal)

    def list_unused(self, modules: Collection[str]) -> list[str]:
        """The targets and the entries of `ignore` that match none of the modules.

        Modules are those with tensors; what contains them can be matched, too.
        """
        paths = {prefix for module in modules for prefix in list_prefixes(module)}
        names = {*paths, *(name for module in modules for name in name_classes(module))}
        patterns = self._target_patterns | self._ignore_patterns
        return [
            name
            for name in dict.fromkeys([*self._groups, *self.ignore])
            if name not in names
            and not (name in patterns and any(map(patterns[name].match, paths)))
        ]

    def match_ignored(self, modules: Collection[str]) -> dict[str, list[str]]:
        """Each entry of `ignore` and the modules that it matches, by name, pattern or class."""
        found: dict[str, list[str]] = {}
        known, patterns = set(modules), self._ignore_patterns
        by_class: dict[str, list[str]] = defaultdict(list)
        for path in modules:
            for name in name_classes(path):
                by_class[name].append(path)
        for name in dict.fromkeys(self.ignore):
            if name in patterns:
                found[name] = [path for path in modules if patterns[name].match(path)]
            elif name in known:
                found[name] = [name]
            else:
                found[name] = by_class.get(name, [])
        return found

    def describe_unused(self, modules: Collection[str]) -> list[str]:
        """The same as warnings; names that differ in numbers alone are in one."""
        alike: dict[str, list[str]] = defaultdict(list)
        for name in self.list_unused(modules):
            alike[name if name.startswith("re:") else star_numbers(name)].append(name)
        return [
            f"{FILE}: pattern {names[0]!r} matches no module"
            if len(names) == 1
            else f"{FILE}: {len(names)} names like {starred!r} match no module"
            for starred, names in alike.items()
        ]

    def check_groups(
        self, modules: Mapping[str, Mapping[str, TensorInfo]]
    ) -> tuple[list[Fault], list[str]]:
        """Look for modules of groups that cannot be read.

        Args:
          modules: the tensors of each module by role.

        Returns:
          The faults of such groups, with the modules that are meant; and, as warnings, the
          faults of those groups that no module of the checkpoint is in.
        """
        if self.absent and (packed := [p for p, found in modules.items() if _is_packed(found)]):
            return [self._refuse_absence(packed, modules)], [*self.remarks]
        refusals = [group for group in self._groups.values() if isinstance(group, Refusal)]
        meant = self._find_refused(modules) if refusals else {}
        faults = [
            dataclasses.replace(fault, what=f"{fault.what}: {described}")
            for refusal, paths in meant.items()
            for described in [describe_modules(paths)]
            for fault in refusal.faults
        ]
        unmet = [
            f"{FILE}: {fault.tensor}: {fault.what}, but no module here is quantized so"
            for refusal in dict.fromkeys(refusals)
            if refusal not in meant
            for fault in refusal.faults
        ]
        return faults, [*self.remarks, *unmet]

    def _refuse_absence(
        self, packed: list[str], modules: Mapping[str, Mapping[str, TensorInfo]]
    ) -> Fault:
        tool, method, more = "compressed-tensors", '"compressed-tensors"', "the original has it"
        if "weight_packed" not in modules[packed[0]]:
            tool, method = "AutoAWQ or GPTQ", '"awq" or "gptq"'
            more = "it may stand in quantize_config.json or quant_config.json"
        what = f"{self.absent}, but modules are packed as by {tool}: {describe_modules(packed)}"
        way_out = f"put the tool's own, with quant_method {method}, into config.json; {more}"
        return Fault(what, FILE, SECTION, way_out)

    def _find_refused(
        self, modules: Mapping[str, Mapping[str, TensorInfo]]
    ) -> dict[Refusal, list[str]]:
        meant: dict[Refusal, list[str]] = defaultdict(list)
        for path, found in modules.items():
            group = self._find_group(path, name_classes(path))
            if isinstance(group, Refusal) and (
                _is_quantized(found) or (group.plain and _is_matrix(found))
            ):
                meant[group].append(path)
        # what attention computes can be quantized, too, by the name or the class of its module
        classes = [name for name in self._groups if name.endswith("Attention")]
        for path in dict.fromkeys(p for module in modules for p in list_prefixes(module)):
            if path not in modules and _ATTENTION.fullmatch(path.rpartition(".")[2]):
                group = self._find_group(path, classes)
                if isinstance(group, Refusal) and group.plain:
                    meant[group].append(path)
        return meant

    def _find_group(self, path: str, classes: Collection[str]) -> Scheme | Refusal | None:
        ignored = self._ignored
        if path in ignored or not ignored.isdisjoint(classes):
            return None
        groups = self._groups
        names = [path] if path in groups and not path.startswith("re:") else []
        pattern = _find(self._target_patterns, path)
        names += [] if pattern is None else [pattern]
        names = names or [name for name in classes if name in groups]
        if not names or _find(self._ignore_patterns, path):
            return None
        return groups[min(names, key=_rank)]

    @property
    def pattern_count(self) -> int:
        """How many patterns each name is matched with at most."""
        return len(self._target_patterns) + len(self._ignore_patterns)

    @functools.cached_property
    def _groups(self) -> dict[str, Scheme | Refusal | None]:
        return dict(self.targets)

    @functools.cached_property
    def _ignored(self) -> frozenset[str]:
        return frozenset(name for name in self.ignore if not name.startswith("re:"))

    @functools.cached_property
    def _target_patterns(self) -> dict[str, Pattern]:
        return _compile(self._groups, self._budget)

    @functools.cached_property
    def _ignore_patterns(self) -> dict[str, Pattern]:
        return _compile(self.ignore, self._budget)

    @functools.cached_property
    def _budget(self) -> Budget:
        return make_budget()


def parse_compressed_tensors(
    raw: dict[str, Any], field: str
) -> tuple[QuantizationConfig, list[Fault]]:
    faults = _check_header(raw, field)
    groups, version = raw.get("config_groups") or {}, str(raw.get("version") or "")
    if not isinstance(groups, dict):
        what = f"expected an object, found {type(groups).__name__}"
        faults.append(Fault(what, FILE, f"{field}.config_groups", MEND))
        groups = {}
    targets: dict[str, Scheme | Refusal | None] = {}
    for name, group in groups.items():
        parsed = parse_group(
            name,
            group,
            f"{field}.config_groups.{name}",
            default_format=raw.get("format"),
            version=version,
        )
        if isinstance(parsed, Fault):
            faults.append(parsed)
        else:
            # of groups that name the same target, the last one counts
            targets |= dict.fromkeys(*parsed)
    ignore = raw.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        faults.append(Fault(f"expected names, found {ignore!r}", FILE, f"{field}.ignore", MEND))
        ignore = []
    patterns = [name for name in [*targets, *ignore] if name.startswith("re:")]
    if many := check_distinct(patterns, field):
        return QuantizationConfig(version=version), [*faults, *many]
    wrong = {name: found for name in [*targets, *ignore] if (found := _check_pattern(name, field))}
    faults += [fault for found in wrong.values() for fault in found]
    targets = {name: scheme for name, scheme in targets.items() if name not in wrong}
    kept = tuple(name for name in ignore if name not in wrong)
    return QuantizationConfig(tuple(targets.items()), kept, version), faults


def _check_header(raw: Mapping[str, Any], field: str) -> list[Fault]:
    """What changes the results of every module."""
    kv_cache, sparsity = raw.get("kv_cache_scheme"), raw.get("sparsity_config")
    transform, pruned = raw.get("transform_config"), raw.get("moe_sparsity_config")
    only_statistics = isinstance(sparsity, dict) and sparsity.get("format") == "dense"
    no_transforms = isinstance(transform, dict) and not any(transform.values())
    wrong = {
        "kv_cache_scheme": (
            kv_cache is not None,
            "a quantized key-value cache changes results",
            "set it to null: the model then has an unquantized cache, and the scales of the "
            "quantized one are left out",
        ),
        "sparsity_config": (
            bool(sparsity) and not only_statistics,
            "compressed sparse weights are not supported",
            "decompress it with compressed-tensors up to 0.14",
        ),
        "transform_config": (
            bool(transform) and not no_transforms,
            "transforms between layers are not supported",
            REQUANTIZE,
        ),
        "moe_sparsity_config": (
            pruned is not None,
            "numbers of experts that differ by layer are not supported",
            "quantize the model before it was pruned",
        ),
    }
    return [
        Fault(what, FILE, f"{field}.{name}", way_out)
        for name, (is_wrong, what, way_out) in wrong.items()
        if is_wrong
    ]


def _check_pattern(name: str, field: str) -> list[Fault]:
    try:
        _compile([name], make_budget())
    except ValueError as error:
        return [Fault(f"{name!r} {error}", FILE, field, MEND)]
    return []


def _is_quantized(found: Mapping[str, TensorInfo]) -> bool:
    """Whether a module's tensors are those of a quantized one, of whatever format."""
    if any(role.startswith(("weight_", "input_", "output_")) for role in found):
        return True
    return "weight" in found and found["weight"].dtype_name not in _FLOATS


def _is_packed(found: Mapping[str, TensorInfo]) -> bool:
    """Whether a module's tensors by role are those of compressed-tensors, AutoAWQ or GPTQ."""
    return "weight_packed" in found or found.keys() >= {"qweight", "scales"}


def _is_matrix(found: Mapping[str, TensorInfo]) -> bool:
    return "weight" in found and len(found["weight"].shape) > 1


def _rank(name: str) -> tuple[bool, str]:
    return "re:" in name, name


def _compile(names: Iterable[str], budget: Budget) -> dict[str, Pattern]:
    """The `re:` patterns among names, in the order in which compressed-tensors tries them."""
    found = sorted(name for name in names if name.startswith("re:"))
    return {name: compile_pattern(name.removeprefix("re:"), budget) for name in found}


def _find(patterns: Mapping[str, Pattern], module: str) -> str | None:
    """The first pattern that matches from the start of a module's path."""
    return next((name for name, pattern in patterns.items() if pattern.match(module)), None)
