r"""Schemes of single modules: `dynamic` of GPTQModel, `extra_config` of AutoRound.

    "dynamic": {"-:.*gate": {}, "+:.*up_proj": {"bits": 8}, ".*down_proj": {"group_size": 64}}
    "extra_config": {"lm_head": {"bits": 8}, ".*mlp\\.gate.*": {"bits": 16, "data_type": "float"}}

Patterns of the first match from the start of a path, those of the second anywhere in it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from loaders.errors import Fault
from loaders.schemes.awq_gptq.schemes import (
    DEQUANTIZE,
    SCHEME_FIELDS,
    TransposedScheme,
    make_scheme,
    override,
)
from loaders.schemes.config_groups import FILE, MEND
from loaders.schemes.patterns.patterns import Budget, Pattern, check_distinct, compile_pattern

DYNAMIC, EXTRA = "dynamic", "extra_config"
# AutoRound's way to say that a module is not quantized
_PLAIN_BITS = (16, 32)
_FLOAT_TYPES = ("float", "fp", "float16", "bfloat16", "float32")
_PATTERN = re.compile(r"[*+?^$()\[\]{}|\\]")
_CHANGES = {
    DYNAMIC: ("bits", "group_size", "sym", "desc_act"),
    EXTRA: ("bits", "group_size", "sym"),
}
# what of AutoRound's scheme of a module would change its numbers, and what it may be
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "act_bits": ((16, 32), "quantized activations are not supported"),
    "data_type": (("int",), "only weights that are integers are read"),
    "super_bits": ((), "quantized scales are not supported"),
    "rotation_config": (({},), "rotations between layers are part of the model"),
}
# what says nothing where that is as it may be
_BESIDE = {"act_group_size", "act_sym", "act_data_type", "act_dynamic", "super_group_size"}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a config says of some modules alone.

    Attributes:
      field: "dynamic" or "extra_config".
      name: the path of one module, or a pattern.
      scheme: None where they stay plain.
      is_path: which of both the name is.
    """

    field: str
    name: str
    scheme: TransposedScheme | None
    is_path: bool = False

    def compile(self, budget: Budget) -> Pattern:
        """The pattern, to be matched from the start of a path."""
        return compile_pattern(_anchor(self.field, self.name), budget)


def parse_rules(
    raw: Mapping[str, Any], field: str, method: str, unread: Iterable[str]
) -> tuple[tuple[Rule, ...], list[Fault]]:
    """Read both fields.

    Args:
      raw: the `quantization_config`.
      field: where it stands in config.json.
      method: "awq" or "gptq", the layout of what is packed.
      unread: names of fields that change nothing.

    Returns:
      The rules: paths first, then patterns in the order of the config; and what is wrong.
    """
    rules: list[Rule] = []
    faults: list[Fault] = []
    stated = {name: raw[name] for name in SCHEME_FIELDS if name in raw}
    for kind in (EXTRA, DYNAMIC):
        entries, where = raw.get(kind) or {}, f"{field}.{kind}"
        if not isinstance(entries, dict):
            faults.append(Fault(f"expected an object, found {entries!r}", FILE, where, MEND))
            continue
        if many := check_distinct(filter(_PATTERN.search, entries), where):
            faults += many
            continue
        for name, changes in entries.items():
            rule, wrong = _parse_rule(name, changes, stated, kind, where, method, {*unread})
            faults += wrong
            rules += [rule] if rule is not None and not wrong else []
    return tuple(sorted(rules, key=lambda rule: not rule.is_path)), faults


def _parse_rule(
    name: str,
    changes: Any,
    raw: Mapping[str, Any],
    kind: str,
    where: str,
    method: str,
    unread: set[str],
) -> tuple[Rule | None, list[Fault]]:
    pattern = name[2:] if kind == DYNAMIC and name.startswith(("-:", "+:")) else name
    is_path = kind == EXTRA and not _PATTERN.search(name)
    faults = [] if is_path else check_pattern(pattern, _anchor(kind, pattern), where)
    if not isinstance(changes, dict):
        what = f"{name!r}: expected an object, found {changes!r}"
        return None, [*faults, Fault(what, FILE, where, MEND)]
    if (pattern != name and name.startswith("-:")) or (kind == EXTRA and _is_plain(changes)):
        return Rule(kind, pattern, None, is_path), faults
    faults += _list_unreadable(name, changes, kind, where, unread)
    chosen = {key: changes[key] for key in _CHANGES[kind] if key in changes}
    if kind == EXTRA:  # which says by null that it is as for the others
        chosen = {key: value for key, value in chosen.items() if value is not None}
    scheme, wrong = make_scheme(override(raw, chosen), where, method)
    return Rule(kind, pattern, scheme, is_path), [*faults, *wrong]


def _list_unreadable(
    name: str, changes: Mapping[str, Any], kind: str, where: str, unread: set[str]
) -> list[Fault]:
    """Fields of a rule that change the numbers, or that nobody knows."""
    refused = _REFUSED if kind == EXTRA else {}
    known = {*_CHANGES[kind], *unread, *refused, *(_BESIDE if kind == EXTRA else ())}
    faults = [
        Fault(f"{name!r}: {what}, found {key} = {changes[key]!r}", FILE, where, DEQUANTIZE)
        for key, (values, what) in refused.items()
        if changes.get(key) is not None and changes[key] not in values
    ]
    return faults + [
        Fault(f"{name!r}: {key} is not known", FILE, where, DEQUANTIZE)
        for key, value in changes.items()
        if key not in known and value is not None
    ]


def _is_plain(changes: Mapping[str, Any]) -> bool:
    """Whether AutoRound left a module as it was: 16 bits, or floats of no width."""
    bits = changes.get("bits")
    return bits in _PLAIN_BITS or (bits is None and changes.get("data_type") in _FLOAT_TYPES)


def check_pattern(name: str, pattern: str, where: str) -> list[Fault]:
    """The fault of a name that is no pattern, or one that could take forever to match."""
    try:
        compile_pattern(name)
        compile_pattern(pattern)
    except ValueError as error:
        return [Fault(f"{name!r} {error}", FILE, where, MEND)]
    return []


def _anchor(field: str, pattern: str) -> str:
    """The pattern that says the same from the start of a path."""
    is_anchored = field == DYNAMIC or (pattern.startswith((".*", "^")) and "|" not in pattern)
    return pattern if is_anchored else f".*(?:{pattern})"
