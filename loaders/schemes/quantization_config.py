"""`quantization_config` of config.json, wherever it stands there -> the reader of its tool.

What the readers make of it says which scheme each module has. Old and terse spellings are read,
too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from loaders.errors import Fault
from loaders.schemes.awq_gptq.auto_round import parse_auto_round
from loaders.schemes.awq_gptq.config import AwqGptqConfig, parse_awq, parse_gptq
from loaders.schemes.compressed_tensors import QuantizationConfig, parse_compressed_tensors
from loaders.schemes.config_groups import FILE, MEND, SECTION
from loaders.schemes.subconfigs import change_all, find_subconfigs

_SECTIONS = (SECTION, "compression_config")

Quantization = QuantizationConfig | AwqGptqConfig
"""What the reader of a tool makes of its config."""

_Reader = Callable[[dict[str, Any], str], tuple[Quantization, list[Fault]]]
_READERS: dict[str, _Reader] = {
    "compressed-tensors": parse_compressed_tensors,
    "sparseml": parse_compressed_tensors,  # its name up to 0.3
    "awq": parse_awq,
    "gptq": parse_gptq,
    "auto-round": parse_auto_round,
    "intel/auto-round": parse_auto_round,
}


def parse_quantization(
    config: dict[str, Any],
) -> tuple[Quantization, list[Fault]]:
    """Read what config.json says of quantization, wherever it stands there.

    Returns:
      What it says; and the faults that hold whatever the files are. Groups that cannot be read are
      faults only if modules are in them (`QuantizationConfig.check_groups`).
    """
    first, last = _SECTIONS
    places = [(first, config.get(first))]
    for name, part in find_subconfigs(config).items():
        places.append((f"{name}.{first}", part.get(first)))
    places.append((last, config.get(last)))
    places = [(field, raw) for field, raw in places if raw not in (None, {})]
    if not places:
        absent = f"is {json.dumps(config[first])}" if first in config else "is not there"
        return QuantizationConfig(absent=absent), []
    (field, raw), *others = places
    parsed, faults = _parse(raw, field)
    remarks = tuple(
        f"{FILE}: {other} differs from {field}, and is not read"
        for other, its in others
        if its != raw and _parse(its, field)[0] != parsed
    )
    return dataclasses.replace(parsed, remarks=(*parsed.remarks, *remarks)), faults


def drop_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json without what it says of quantization, wherever it stands there."""

    def drop(part: Mapping[str, Any]) -> dict[str, Any]:
        names = _SECTIONS if part is config else _SECTIONS[:1]
        return {key: value for key, value in part.items() if key not in names}

    return change_all(config, drop)


def says_quantization(config: Mapping[str, Any]) -> bool:
    """Whether config.json mentions quantization, even if only to say that there is none."""
    return drop_quantization(config) != dict(config)


def _parse(raw: Any, field: str) -> tuple[Quantization, list[Fault]]:
    """Dispatch on quant_method: each has its own reader in `_READERS`."""
    if not isinstance(raw, dict):
        what = f"expected an object, found {type(raw).__name__}"
        return QuantizationConfig(), [Fault(what, FILE, field, MEND)]
    inner = raw.get("quantization_config")
    if "config_groups" not in raw and isinstance(inner, dict):
        raw = raw | inner  # before 0.4, and as transformers 4 kept it
    method = raw.get("quant_method", "compressed-tensors" if "config_groups" in raw else None)
    name = method.lower().replace("_", "-") if isinstance(method, str) else None
    if name not in _READERS:
        what = f"expected {' or '.join(map(repr, _READERS))}, found {method!r}"
        way_out = "load it with transformers, save it dequantized and `jaxwna16 quantize` that"
        return QuantizationConfig(), [Fault(what, FILE, f"{field}.quant_method", way_out)]
    return _READERS[name](raw, field)
