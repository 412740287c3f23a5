"""Weights that are quantized in a way that is not read, beside those that are or alone.

Without their scales, which have names of their own in every tool, such numbers mean nothing. So
modules that hold them are found whatever config.json says, and are never taken for plain ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from loaders.errors import Fault
from loaders.files.safetensors_file import TensorInfo
from loaders.schemes.module_names import describe_modules

_WAY_OUT = (
    "quantize the original model; or multiply these weights by their scales, store the products as "
    "bfloat16 and remove the scales"
)


def find_other_numbers(
    by_module: Mapping[str, Mapping[str, TensorInfo]], *, quantized: bool
) -> dict[str, str]:
    """Path of each module with such weights -> what they are.

    Args:
      by_module: the tensors of all modules by role, under the names in the files.
      quantized: whether config.json says that anything is. Else floats of 8 bits without a scale
        beside them are what they are.
    """
    kinds = {path: _name_numbers(found, quantized) for path, found in by_module.items()}
    return {path: kind for path, kind in kinds.items() if kind}


def list_other_numbers(
    kinds: Mapping[str, str], by_module: Mapping[str, Mapping[str, TensorInfo]]
) -> list[Fault]:
    """One fault for all modules of a kind; arguments as `find_other_numbers` takes and gives."""
    alike: dict[str, list[str]] = defaultdict(list)
    for path, kind in kinds.items():
        alike[kind].append(path)
    return [
        Fault(
            f"{kind}: only packed integers are read: {describe_modules(paths)}",
            next(iter(by_module[paths[0]].values())).file.name,
            paths[0],
            _WAY_OUT,
        )
        for kind, paths in alike.items()
    ]


def _name_numbers(found: Mapping[str, TensorInfo], quantized: bool) -> str:
    weight, words = found.get("weight"), found.get("weight_packed")
    scaled = any("scale" in role or role == "SCB" for role in found)
    if weight is not None and scaled and np.issubdtype(weight.dtype, np.integer):
        return f"{weight.dtype_name} weights with scales"
    if words is None and (quantized or scaled):
        for role, info in found.items():
            is_weight = role == "weight" or len(info.shape) > 1
            if is_weight and info.dtype_name.startswith("float8"):
                return f"FP8 weights ({info.dtype_name})"
    return "FP4 weights (two in each uint8)" if _holds_fp4(found) else ""


def _holds_fp4(found: Mapping[str, TensorInfo]) -> bool:
    """NVFP4 and MXFP4 of compressed-tensors, or the blocks of gpt-oss."""
    dtypes = {role: info.dtype_name for role, info in found.items()}
    if dtypes.get("weight_packed") == "uint8":
        # E8M0, too, which older files call uint8
        scale = dtypes.get("weight_scale", "")
        return "weight_global_scale" in dtypes or scale == "uint8" or scale.startswith("float8")
    return any(
        dtype == "uint8" and role.endswith("blocks") and f"{role[:-6]}scales" in dtypes
        for role, dtype in dtypes.items()
    )
