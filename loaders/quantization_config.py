"""`quantization_config` of config.json -> which scheme each module has.

The fields are those of compressed-tensors' `QuantizationConfig`; targets are matched as its
`utils/match.py` does: an exact name before a regular expression before a class name, whatever the
order of the groups; `re:` patterns are anchored at the start only.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from loaders.errors import Fault

FILE = "config.json"
_REQUANTIZE = "re-quantize it to W4A16 or W8A16, or decompress it with compressed-tensors"
_PRESETS = {
    "W4A16": {"num_bits": 4, "group_size": 128, "symmetric": True},
    "W4A16_ASYM": {"num_bits": 4, "group_size": 128, "symmetric": False},
    "W8A16": {"num_bits": 8, "group_size": 128, "symmetric": True},
}
_SUPPORTED_WEIGHTS: dict[str, tuple] = {
    "num_bits": (4, 8),
    "type": ("int", None),
    "dynamic": (False, None),
    "block_structure": (None,),
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are quantized; group_size -1 is one group per channel."""

    bits: int
    group_size: int
    symmetric: bool


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Targets with their scheme, and what is ignored; empty where nothing is quantized."""

    targets: tuple[tuple[str, Scheme], ...] = ()
    ignore: tuple[str, ...] = ()
    version: str = ""

    def find_scheme(self, module: str, class_name: str = "Linear") -> Scheme | None:
        """The scheme of a module, or None where it is ignored or no target matches."""
        ignored, schemes = self._ignored, self._schemes
        if module in ignored or class_name in ignored or _find(self._ignore_patterns, module):
            return None
        target = module if module in schemes else _find(self._target_patterns, module) or class_name
        return schemes.get(target)

    def list_unused(self, modules: Collection[str], class_name: str = "Linear") -> list[str]:
        """The targets and the entries of `ignore` that match none of the modules."""
        names = {*modules, class_name} if modules else set()
        patterns = self._target_patterns | self._ignore_patterns
        return [
            name
            for name in [*self._schemes, *self.ignore]
            if name not in names
            and not (name in patterns and any(map(patterns[name].match, modules)))
        ]

    @functools.cached_property
    def _schemes(self) -> dict[str, Scheme]:
        return dict(self.targets)

    @functools.cached_property
    def _ignored(self) -> frozenset[str]:
        return frozenset(self.ignore)

    @functools.cached_property
    def _target_patterns(self) -> dict[str, re.Pattern[str]]:
        return _compile(self._schemes)

    @functools.cached_property
    def _ignore_patterns(self) -> dict[str, re.Pattern[str]]:
        return _compile(self.ignore)


def parse_quantization(config: dict[str, Any]) -> tuple[QuantizationConfig, list[Fault]]:
    """Read `quantization_config`; the faults name each field that asks for the unsupported."""
    raw = config.get("quantization_config", config.get("compression_config"))
    if raw is None:
        return QuantizationConfig(), []
    if not isinstance(raw, dict):
        return QuantizationConfig(), [_fault("", f"expected an object, found {type(raw).__name__}")]
    faults = _check_header(raw)
    groups = raw.get("config_groups") or {}
    if not isinstance(groups, dict) or not groups:
        return QuantizationConfig(), [
            *faults,
            _fault("config_groups", "no group of modules is described"),
        ]
    targets: dict[str, Scheme] = {}
    for name, group in groups.items():
        if name.upper() in _PRESETS and isinstance(group, list):
            group = {"targets": group, "weights": _PRESETS[name.upper()]}
        field = f"config_groups.{name}"
        if not isinstance(group, dict) or not _are_strings(group.get("targets")):
            faults.append(_fault(field, "expected an object with a list of targets"))
            continue
        scheme, wrong = _parse_group(group, field, raw.get("format"))
        faults += wrong
        if scheme is not None:
            # of groups that name the same target, the last one counts
            targets |= dict.fromkeys(group["targets"], scheme)
    ignore = raw.get("ignore") or []
    if not _are_strings(ignore):
        faults.append(_fault("ignore", f"expected a list of names, found {ignore!r}"))
        ignore = []
    for pattern in [*targets, *ignore]:
        faults += _check_pattern(pattern)
    return QuantizationConfig(
        tuple(targets.items()), tuple(ignore), str(raw.get("version") or "")
    ), faults


def _check_header(raw: dict[str, Any]) -> list[Fault]:
    faults = []
    method = raw.get("quant_method")
    if method not in ("compressed-tensors", None):
        faults.append(
            _fault("quant_method", f"expected 'compressed-tensors', found {method!r}", _REQUANTIZE)
        )
    if raw.get("format") not in ("pack-quantized", "mixed-precision"):
        faults.append(
            _fault("format", f"expected 'pack-quantized', found {raw.get('format')!r}", _REQUANTIZE)
        )
    for field in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        value = raw.get(field)
        if value and value not in ({"format": "dense"}, {"config_groups": {}}):
            faults.append(_fault(field, "is not supported, and changes results", _REQUANTIZE))
    return faults


def _parse_group(
    group: dict[str, Any], field: str, default_format: Any
) -> tuple[Scheme | None, list[Fault]]:
    faults = []
    for side in ("input_activations", "output_activations"):
        if group.get(side):
            faults.append(
                _fault(f"{field}.{side}", "quantized activations are not supported", _REQUANTIZE)
            )
    layout = group.get("format") or default_format
    if layout not in ("pack-quantized", "mixed-precision"):
        faults.append(
            _fault(f"{field}.format", f"expected 'pack-quantized', found {layout!r}", _REQUANTIZE)
        )
    weights = group.get("weights")
    if not isinstance(weights, dict):
        return None, [*faults, _fault(f"{field}.weights", "expected an object", _REQUANTIZE)]
    for key, allowed in _SUPPORTED_WEIGHTS.items():
        if (type(weights.get(key)), weights.get(key)) not in [(type(a), a) for a in allowed]:
            expected = (
                " or ".join(repr(value) for value in allowed if value is not None) or "nothing"
            )
            what = f"expected {expected}, found {weights.get(key)!r}"
            faults.append(_fault(f"{field}.weights.{key}", what, _REQUANTIZE))
    if weights.get("actorder") not in (None, False, "weight", "static"):
        faults.append(
            _fault(
                f"{field}.weights.actorder",
                f"activation order {weights['actorder']!r} is not supported yet",
                'quantize with actorder "weight" or none',
            )
        )
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if size is not None and (type(size) is not int or size == 0 or size < -1):
        faults.append(
            _fault(f"{field}.weights.group_size", f"expected a size above 0 or -1, found {size!r}")
        )
        return None, faults
    if strategy is None:
        strategy = "tensor" if size is None else "group" if size > 0 else "channel"
    if strategy not in ("group", "channel"):
        faults.append(
            _fault(
                f"{field}.weights.strategy",
                f"expected group or channel, found {strategy!r}",
                _REQUANTIZE,
            )
        )
    elif (strategy == "group") != (size is not None and size > 0):
        what = f"{size!r} contradicts strategy {strategy!r}"
        faults.append(_fault(f"{field}.weights.group_size", what))
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        faults.append(
            _fault(f"{field}.weights.symmetric", f"expected true or false, found {symmetric!r}")
        )
    if faults:
        return None, faults
    return Scheme(weights["num_bits"], size or -1, symmetric), []


def _check_pattern(pattern: str) -> list[Fault]:
    try:
        re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        if pattern.startswith("re:"):
            return [_fault(pattern, f"is not a regular expression: {error}")]
    return []


def _compile(names: Iterable[str]) -> dict[str, re.Pattern[str]]:
    """The `re:` patterns among names, in the order in which compressed-tensors tries them."""
    return {n: re.compile(n.removeprefix("re:")) for n in sorted(names) if n.startswith("re:")}


def _find(patterns: Mapping[str, re.Pattern[str]], module: str) -> str | None:
    """The first pattern that matches from the start of a module's path."""
    return next((name for name, pattern in patterns.items() if pattern.match(module)), None)


def _are_strings(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(v, str) for v in values)


def _fault(field: str, what: str, way_out: str = "") -> Fault:
    return Fault(what, FILE, f"quantization_config.{field}".rstrip("."), way_out)
