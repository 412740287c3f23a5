"""Biases of zeros in files of models that have none.

AutoGPTQ of 2023 gave every quantized linear a bias, also those of a Llama (AutoGPTQ/AutoGPTQ#555).
Where the model has no place for one and all of it is 0, leaving it out changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from loaders.files.safetensors_file import read_tensors
from loaders.modules.modules import QuantizedModule
from loaders.plan import Plan


def drop_zero_biases(plan: Plan, has_place: Callable[[str], bool]) -> Plan:
    """The plan without them, with a warning; any other bias stays, and is an error later.

    Only biases that the model has no place for are read.

    Args:
      plan: of the checkpoint.
      has_place: whether the model has a leaf for a tensor of that name.

    Raises:
      CheckpointError: if a file ends early.
    """
    extra = {
        path: module.tensors["bias"]
        for path, module in plan.quantized.items()
        if "bias" in module.tensors and path not in plan.places and not has_place(f"{path}.bias")
    }
    read = dict(zip(extra, read_tensors(extra.values()), strict=True))
    zeros = [path for path, bias in read.items() if not bias.any()]
    if not zeros:
        return plan
    more = f" and {len(zeros) - 1} more modules" if len(zeros) > 1 else ""
    warning = f"{zeros[0]}{more}: the bias, which this model does not have, is all 0 and left out"
    changed = {path: _drop_bias(plan.quantized[path]) for path in zeros}
    return dataclasses.replace(
        plan,
        quantized={path: changed.get(path, m) for path, m in plan.quantized.items()},
        warnings=(*plan.warnings, warning),
    )


def _drop_bias(module: QuantizedModule) -> QuantizedModule:
    tensors = {role: info for role, info in module.tensors.items() if role != "bias"}
    return dataclasses.replace(module, tensors=tensors)
