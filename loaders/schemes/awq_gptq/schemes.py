"""How the modules of AutoAWQ and GPTQ are quantized: a `TransposedScheme` from a few fields.

Fields are called as by transformers, or as by the tools themselves ("w_bit"). The fields are those
of a whole `quantization_config`, or the same with those of one module in their place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from loaders.errors import Fault
from loaders.schemes.config_groups import FILE, MEND, Scheme
from loaders.schemes.packings import AWQ, GPTQ, LESS_ONE, LESS_ONE_BORROWED, MIDDLE, MIDDLE_LESS_ONE
from loaders.schemes.presets import parse_version

DEQUANTIZE = "load it with the tool that wrote it, save it dequantized and `jaxwna16 quantize` that"
SPELLINGS = {"bits": ("bits", "w_bit", "wbits"), "group_size": ("group_size", "q_group_size")}
SCHEME_FIELDS = (
    *(name for names in SPELLINGS.values() for name in names),
    *("sym", "desc_act", "zero_point", "checkpoint_format", "format", "meta"),
)
"""All that `make_scheme` reads."""
_BITS = {AWQ: (4,), GPTQ: (2, 3, 4, 8)}
# before, GPTQModel took 1 from the wrong bits of 3-bit zero points (ModelCloud/GPTQModel#2763)
_FIRST_SOUND_3_BITS = (7, 0)


@dataclasses.dataclass(frozen=True)
class TransposedScheme(Scheme):
    """The scheme of modules in the layout of AutoAWQ or GPTQ.

    Attributes:
      words: "awq" or "gptq".
      zero_points: how they are stored, in the terms of `loaders.modules.encoding.Encoding`.
    """

    words: str = GPTQ
    zero_points: str = LESS_ONE


def make_scheme(
    raw: Mapping[str, Any], field: str, method: str
) -> tuple[TransposedScheme | None, list[Fault]]:
    """The scheme that fields describe.

    Args:
      raw: the fields.
      field: where they stand in config.json.
      method: "awq" or "gptq".

    Returns:
      The scheme, or None and the faults of the fields.
    """
    bits, size = (find_field(raw, SPELLINGS[name]) for name in ("bits", "group_size"))
    faults = [
        expect("true or false", raw, name, field)
        for name in ("sym", "desc_act", "zero_point")
        if raw.get(name) is not None and not isinstance(raw[name], bool)
    ]
    if type(bits) is not int or bits not in _BITS[method]:
        expected = " or ".join(map(str, _BITS[method]))
        what = f"expected {expected} of {method}, found {bits!r}"
        faults.append(Fault(what, FILE, f"{field}.bits", DEQUANTIZE))
    if type(size) is not int or (size != -1 and size <= 0):
        what = f"expected a size above 0 or -1, found {size!r}"
        faults.append(Fault(what, FILE, f"{field}.group_size", MEND))
    if faults:
        return None, faults
    if method == AWQ:
        # without `zero_point`, GPTQModel and AutoRound say the same by `sym`
        symmetric = raw.get("zero_point") is False or (
            raw.get("zero_point") is None and raw.get("sym") is True
        )
        zero_points = MIDDLE if symmetric else "words"
        return TransposedScheme(bits, size, symmetric, words=AWQ, zero_points=zero_points), []
    # a config that does not say so may mean either; what the tensors hold is right in any case
    symmetric, reordered = raw.get("sym") is True, raw.get("desc_act") is not False
    zero_points, faults = _find_zero_points(raw, field, bits, symmetric)
    return TransposedScheme(bits, size, symmetric, reordered, GPTQ, zero_points), faults


def override(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config with those of a rule in place of its own, however these are spelt."""
    spelt = {n for name in changes for n in SPELLINGS.get(name, (name,))}
    spelt |= {"zero_point"} if "sym" in changes else set()
    return {name: value for name, value in raw.items() if name not in spelt} | dict(changes)


def find_field(raw: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The value of the first of several spellings that is there and not null; None without any."""
    return next((raw[name] for name in names if raw.get(name) is not None), None)


def expect(expected: str, raw: Mapping[str, Any], name: str, field: str) -> Fault:
    """The fault of a field that holds something else."""
    return Fault(f"expected {expected}, found {raw[name]!r}", FILE, f"{field}.{name}", MEND)


def _find_zero_points(
    raw: Mapping[str, Any], field: str, bits: int, symmetric: bool
) -> tuple[str, list[Fault]]:
    """How GPTQ's are stored, and the fault of those that nobody can read."""
    stated = find_field(raw, ("checkpoint_format", "format")) or "gptq"
    if str(stated).lower() == "gptq_v2":
        return MIDDLE if symmetric else "words", []
    if symmetric:
        return MIDDLE_LESS_ONE, []
    writer = _find_writer(raw)
    if writer is None:
        return LESS_ONE, []
    if 32 % bits and writer < _FIRST_SOUND_3_BITS:
        what = f"asymmetric {bits}-bit weights in format 'gptq', which GPTQModel before 7.0 garbles"
        way_out = "quantize it again, in format gptq_v2"
        return LESS_ONE_BORROWED, [Fault(what, FILE, f"{field}.bits", way_out)]
    return LESS_ONE_BORROWED, []


def _find_writer(raw: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The version of GPTQModel, (0, 0) if it does not say; None where another tool wrote it."""
    meta = raw.get("meta")
    tools = meta.get("quantizer") if isinstance(meta, dict) else None
    for tool in tools if isinstance(tools, list) else [tools]:
        name, _, version = str(tool).partition(":")
        if name.lower() == "gptqmodel":
            return parse_version(version) or (0, 0)
    return None
