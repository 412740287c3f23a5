"""The presets of compressed-tensors: names that stand for a whole group, {"W4A16": [targets]}.

They are those of `quant_scheme.PRESET_SCHEMES` from 0.4 to 0.20. W8A16 is one group per channel up
to 0.15 and groups of 128 from 0.16 on; W8A8 was per tensor in 0.4. Those of which the loader can
read no weights are here too, so that they are refused for what they are.
"""

from __future__ import annotations

import re
from typing import Any

_FIRST_W8A16_IN_GROUPS = (0, 16)


def find_preset(name: str, version: str) -> dict[str, Any] | None:
    """The group that a preset stands for, without its targets.

    Args:
      name: as compressed-tensors, in any case.
      version: of the compressed-tensors that wrote the config; "" is the newest.

    Returns:
      A new dict of the fields of a group that are not null; None if there is no such preset.
    """
    name = name.upper()
    if name == "W8A16" and (parse_version(version) or _FIRST_W8A16_IN_GROUPS) < (0, 16):
        return {"weights": _describe(8, strategy="channel")}
    group = _PRESETS.get(name)
    return None if group is None else {side: dict(fields) for side, fields in group.items()}


def parse_version(version: str) -> tuple[int, ...] | None:
    """(0, 17, 1) of "0.17.1.a20260101"; None if it does not begin with two numbers."""
    match = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", version, re.ASCII)
    return tuple(int(part) for part in match.groups("0")) if match else None


def _describe(num_bits: int, kind: str = "int", **fields: Any) -> dict[str, Any]:
    return {"num_bits": num_bits, "type": kind, "symmetric": True, "dynamic": False} | fields


def _list_integer_presets() -> dict[str, dict[str, Any]]:
    """WxAy: weights of 2 to 8 bits in groups of 128, activations of 4, 8 or 16 (float) bits."""
    presets = {}
    for bits in range(2, 9):
        weights = _describe(bits, strategy="group", group_size=128)
        presets[f"W{bits}A16"] = {"weights": weights}
        for act in (4, 8):
            if bits <= act and bits != 8:
                inputs = _describe(act, strategy="token", dynamic=True)
                presets[f"W{bits}A{act}"] = {"weights": weights, "input_activations": inputs}
    return presets


def _list_float_presets() -> dict[str, dict[str, Any]]:
    """fp8, NVFP4 and the MX formats."""
    token = _describe(8, "float", strategy="token", dynamic=True)
    fp8 = _describe(8, "float", strategy="tensor")
    blocks = _describe(8, "float", strategy="block", block_structure=[128, 128])
    fours = _describe(4, "float", strategy="tensor_group", group_size=16)
    mx = {bits: _describe(bits, "float", strategy="group", group_size=32) for bits in (4, 6, 8)}
    inputs = {
        "FP8": fp8,
        "FP8_DYNAMIC": token,
        "FP8_BLOCK": _describe(8, "float", strategy="group", group_size=128, dynamic=True),
        "NVFP4": fours | {"dynamic": "local"},
        "MXFP4": mx[4] | {"dynamic": True},
        "MXFP4XFP8": _describe(8, "float", strategy="group", group_size=128, dynamic=True),
        "MXFP6A8": mx[8] | {"dynamic": True},
        "MXFP8": mx[8] | {"dynamic": True},
    }
    weights = {
        "FP8": fp8,
        "FP8_DYNAMIC": _describe(8, "float", strategy="channel"),
        "FP8_BLOCK": blocks,
        "NVFP4": fours,
        "NVFP4A16": fours,
        "MXFP4": mx[4],
        "MXFP4A16": mx[4],
        "MXFP4XFP8": mx[4],
        "MXFP6A8": mx[6],
        "MXFP6A16": mx[6],
        "MXFP8": mx[8],
        "MXFP8A16": mx[8],
    }
    return {
        name: {"weights": fields} | ({"input_activations": inputs[name]} if name in inputs else {})
        for name, fields in weights.items()
    }


_W8A8 = {
    "weights": _describe(8, strategy="channel"),
    "input_activations": _describe(8, strategy="token", dynamic=True),
}
_FOUR_IN_GROUPS = _describe(4, strategy="group", group_size=128)
_PRESETS: dict[str, dict[str, Any]] = {
    **_list_integer_presets(),
    **_list_float_presets(),
    "UNQUANTIZED": {},
    "W4A16_ASYM": {"weights": _FOUR_IN_GROUPS | {"symmetric": False}},
    "W4AFP8": {
        "weights": _FOUR_IN_GROUPS,
        "input_activations": _describe(8, "float", strategy="token", dynamic=True),
    },
    "W8A8": _W8A8,
    "INT8": _W8A8,
}
