"""`quantization_config` of AutoRound's own format -> that of AutoAWQ or GPTQ, which it packs like.

    packing_format                       words    of a zero point z, it stores
    auto_round:auto_gptq, …:gptq         GPTQ     z - 1, as format "gptq"
    auto_round, auto_round:gptqmodel     GPTQ     z, as format "gptq_v2"
    auto_round:auto_awq, …:awq           AWQ      z

Up to 0.5 the field is `backend` and may end in a kernel's name ("auto_round:gptq:exllamav2"), or be
that of AutoRound's own kernel, "auto_round:exllamav2"; later, `backend` is the kernel to run with.
Without either it is the first line, as in AutoRound and transformers
(`auto_round/inference/convert_model.py`, `auto_round/export/export_to_autoround/export.py`).

There is no `g_idx`, or one in column order. What is packed is what has a `qweight`, `lm_head` among
it; `block_name_to_quantize` says no more.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from loaders.errors import Fault
from loaders.schemes.awq_gptq.config import AwqGptqConfig, parse_awq, parse_gptq
from loaders.schemes.awq_gptq.schemes import DEQUANTIZE
from loaders.schemes.config_groups import FILE
from loaders.schemes.packings import AWQ, GPTQ

# the first word -> the layout, and its format in the terms of the tools
_LAYOUTS = {
    "auto": (GPTQ, "gptq"),
    "gptq": (GPTQ, "gptq"),
    "auto_gptq": (GPTQ, "gptq"),
    "auto_round": (GPTQ, "gptq_v2"),
    "gptqmodel": (GPTQ, "gptq_v2"),
    "exllamav2": (GPTQ, "gptq_v2"),
    "triton": (GPTQ, "gptq_v2"),
    "tritonv2": (GPTQ, "gptq_v2"),
    "awq": (AWQ, "gemm"),
    "auto_awq": (AWQ, "gemm"),
}
# kernels whose names may follow; Marlin's packs otherwise
_KERNELS = {"exllama", "exllamav1", "exllamav2", "triton", "tritonv2", "cuda", "gemm"}
_FIELDS = ("packing_format", "backend")


def parse_auto_round(raw: dict[str, Any], field: str) -> tuple[AwqGptqConfig, list[Fault]]:
    """Read the config; arguments and result as `parse_awq`."""
    stated = next((name for name in _FIELDS if raw.get(name) is not None), None)
    value = "auto" if stated is None else raw[stated]
    layout = _find_layout(value)
    if layout is None:
        names = "'auto_round', 'auto_round:auto_gptq' or 'auto_round:auto_awq'"
        what = f"expected {names}, found {value!r}"
        return AwqGptqConfig(GPTQ), [Fault(what, FILE, f"{field}.{stated}", DEQUANTIZE)]
    method, form = layout
    own = {name: held for name, held in raw.items() if name not in _FIELDS}
    own |= {"checkpoint_format": form, "lm_head": True}
    if own.get("desc_act") is None:
        own["desc_act"] = False
    config, faults = (parse_awq if method == AWQ else parse_gptq)(own, field)
    return dataclasses.replace(config, method=raw["quant_method"]), faults


def _find_layout(value: Any) -> tuple[str, str] | None:
    """The layout that a packing format means: "auto_round:gptq:exllamav2" -> GPTQ, "gptq"."""
    words = str(value).lower().replace("-", "_").split(":")
    first, *kernels = words[1:] if words[0] == "auto_round" and words[1:] else words
    return _LAYOUTS.get(first) if _KERNELS.issuperset(kernels) else None
