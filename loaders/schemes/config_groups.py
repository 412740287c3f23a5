"""One group of `config_groups`: which scheme its weights have, or why they cannot be read.

The fields and their defaults are those of compressed-tensors' `QuantizationScheme` and
`QuantizationArgs`. A null field counts as left out, except `symmetric` and `num_bits`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from loaders.errors import Fault, limit_faults
from loaders.schemes.presets import find_preset, parse_version

FILE = "config.json"
SECTION = "quantization_config"
REQUANTIZE = (
    "decompress it with compressed-tensors and `jaxwna16 quantize` it, or quantize the original "
    "model to W4A16 or W8A16"
)
MEND = "correct config.json"
_SIDES = ("input_activations", "output_activations")
_GROUP_FIELDS = {"targets", "weights", "format", *_SIDES}
_WEIGHT_FIELDS = {
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic"),
    *("actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
}
_MOST_FAULTS = 30
_ORDERS = ["group", "dynamic", "weight", "static"]
_FIRST_EXPLICIT_ORDER = (0, 12)
_UNKNOWN = "is a field that compressed-tensors 0.20 does not have"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are quantized in the files.

    Attributes:
      bits: of a value, 1 to 8.
      group_size: input features that have one scale; -1 for all of them ("channel").
      symmetric: whether there are no zero points.
      reordered: whether there must be a `weight_g_idx`.
    """

    bits: int
    group_size: int
    symmetric: bool
    reordered: bool = False


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a group cannot be read. It is a fault only where modules of the checkpoint are meant.

    Attributes:
      faults: at least one, each of a field.
      plain: whether it is activations alone that are quantized, of modules with plain weights.
    """

    faults: tuple[Fault, ...]
    plain: bool = False


def parse_group(
    name: str, group: Any, field: str, *, default_format: Any, version: str
) -> tuple[list[str], Scheme | Refusal | None] | Fault:
    """Read a group.

    Args:
      name: the key in `config_groups`: of a preset, where the group is a list of targets.
      group: its value.
      field: where that stands in config.json.
      default_format: the one of the whole config.
      version: the one of the whole config, or "".

    Returns:
      Its targets and their scheme, None where their weights stay plain. Or a fault, where not even
      the targets can be read.
    """
    faults: list[Fault] = []
    if _are_strings(group):
        preset, targets = find_preset(name, version), group
        if preset is None:
            what = f"{name!r} is no preset of compressed-tensors 0.20"
            return targets, Refusal((Fault(what, FILE, field, "write the group's fields out"),))
        group = preset
    elif isinstance(group, dict) and _are_strings(group.get("targets")):
        targets = group["targets"]
        faults += _find_unknown(group, _GROUP_FIELDS, field)
    else:
        return Fault("expected an object with a list of targets", FILE, field, MEND)
    weights = group.get("weights")
    faults += _check_activations(group, field)
    if weights is None:
        return targets, _refuse(faults, plain=True) if faults else None
    faults += _check_format(group.get("format"), default_format, field)
    scheme, wrong = _parse_weights(weights, f"{field}.weights", version)
    faults += wrong
    return targets, scheme if scheme is not None and not faults else _refuse(faults)


def _refuse(faults: list[Fault], *, plain: bool = False) -> Refusal:
    """Of faults without number the first, since modules are told apart by their refusal."""
    return Refusal(tuple(limit_faults(faults, _MOST_FAULTS)), plain)


def _check_activations(group: Mapping[str, Any], field: str) -> list[Fault]:
    return [
        Fault("quantized activations are not supported", FILE, f"{field}.{side}", REQUANTIZE)
        for side in _SIDES
        if group.get(side) is not None
    ]


def _check_format(own: Any, default: Any, field: str) -> list[Fault]:
    """Without a format, integers that are weights alone are packed (`infer_module_format`)."""
    if own is None:
        if default in (None, "pack-quantized", "mixed-precision"):
            return []
        # of the whole config, which is two levels up
        field, own = field.partition(".config_groups.")[0], default
    if own == "pack-quantized":
        return []
    what = f"expected 'pack-quantized', found {own!r}"
    return [Fault(what, FILE, f"{field}.format", REQUANTIZE)]


def _parse_weights(weights: Any, field: str, version: str) -> tuple[Scheme | None, list[Fault]]:
    if not isinstance(weights, dict):
        return None, [Fault(f"expected an object, found {weights!r}", FILE, field, MEND)]
    faults = _find_unknown(weights, _WEIGHT_FIELDS, field)

    def check(key: str, good: bool, expected: str, way_out: str = REQUANTIZE) -> None:
        if not good:
            what = f"expected {expected}, found {weights.get(key)!r}"
            faults.append(Fault(what, FILE, f"{field}.{key}", way_out))

    bits, symmetric = weights.get("num_bits", 8), weights.get("symmetric", True)
    check("num_bits", type(bits) is int and 1 <= bits <= 8, "1 to 8")
    check("symmetric", isinstance(symmetric, bool), "true or false", MEND)
    check("type", _lower(weights.get("type")) in ("int", None), "'int'")
    check("dynamic", weights.get("dynamic") in (False, None), "false")
    order = _lower(weights.get("actorder"))
    known = order is None or isinstance(order, bool) or order in _ORDERS
    check("actorder", known, f"true, false or one of {', '.join(_ORDERS)}")
    size, wrong = _parse_group_size(weights, field)
    faults += wrong
    if faults:
        return None, faults
    # before, weight_g_idx was left out of files where the order is that of the columns
    must_say = (parse_version(version) or (0, 0)) >= _FIRST_EXPLICIT_ORDER
    reordered = must_say and size > 0 and (order is True or order in _ORDERS[:2])
    return Scheme(bits, size, symmetric, reordered), []


def _parse_group_size(weights: Mapping[str, Any], field: str) -> tuple[int, list[Fault]]:
    """The group size, -1 for strategy "channel"; the strategy is inferred where it is missing."""
    size, strategy = weights.get("group_size"), _lower(weights.get("strategy"))
    if size is not None and (type(size) is not int or size < -1 or (size, strategy) == (0, None)):
        what = f"expected a size above 0 or -1, found {size!r}"
        return 0, [Fault(what, FILE, f"{field}.group_size", MEND)]
    if strategy is None:
        strategy = "tensor" if size is None else "group" if size > 0 else "channel"
    if strategy not in ("group", "channel"):
        what = f"expected group or channel, found {strategy!r}"
        return 0, [Fault(what, FILE, f"{field}.strategy", REQUANTIZE)]
    if (strategy == "group") != (size is not None and size > 0):
        what = f"{size!r} contradicts strategy {strategy!r}"
        return 0, [Fault(what, FILE, f"{field}.group_size", MEND)]
    if weights.get("block_structure") is not None:
        what = f"{weights['block_structure']!r} contradicts strategy {strategy!r}"
        return 0, [Fault(what, FILE, f"{field}.block_structure", MEND)]
    return size if size and strategy == "group" else -1, []


def _find_unknown(fields: Mapping[str, Any], known: set[str], where: str) -> list[Fault]:
    """What nobody knows could change what the integers mean, unless it is null."""
    return [
        Fault(_UNKNOWN, FILE, f"{where}.{key}", "remove it, if it does not change the weights")
        for key, value in fields.items()
        if key not in known and value is not None
    ]


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _are_strings(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(v, str) for v in values)
