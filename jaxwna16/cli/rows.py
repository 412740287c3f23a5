"""Modules and tensors as rows of a table; a row covers all layers and experts with one name."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from loaders.files.safetensors_file import TensorInfo
from loaders.modules.experts import split_name
from loaders.modules.modules import QuantizedModule
from loaders.plan import Plan, Survey
from loaders.schemes.module_names import star_numbers
from pallas_kernels.backends import explain

_SLICE = re.compile(r"\[[0-9]+\]$")
_EXPERTS = re.compile(r"(^|\.)experts[.\[]")
# jaxwna16.models.filling.expanded asks the model instead, which needs flax
_EXPANDED = re.compile(r"(.*\.)?(embed_tokens|gate|shared_expert_gate|self_attn\.kv_b_proj)")
_FLOATS = "load_model holds them as floats"


def list_module_rows(
    plan: Plan, skipped: Mapping[str, str], dtype: str, lack: str
) -> list[dict[str, Any]]:
    """The quantized modules, in the order of the files.

    Args:
      plan: the checkpoint's plan.
      skipped: paths that `load_model` leaves out, with the reason.
      dtype: the dtype of activations, for the choice of the backend.
      lack: the reason why there is no device, or "".
    """
    alike: dict[tuple, list[QuantizedModule]] = defaultdict(list)
    for path, module in plan.quantized.items():
        scale_dtype = module.tensors["weight_scale"].dtype_name
        key = (
            make_pattern(path),
            module.spec,
            module.encoding,
            scale_dtype,
            "bias" in module.tensors,
            _EXPERTS.search(path) is not None,
            path in plan.expanded or _EXPANDED.fullmatch(path) is not None,
            skipped.get(path, ""),
        )
        alike[key].append(module)
    return [
        {
            "modules": pattern,
            "count": len(found),
            "out_features": spec.out_features,
            "in_features": spec.in_features,
            "bits": encoding.bits,
            "widened_to": spec.bits if spec.bits != encoding.bits else None,
            "extra_bytes": count_extra_bytes(found),
            "strategy": "channel" if spec.groups == 1 else "group",
            "group_size": found[0].group_size,
            "divided_to": spec.group_size if encoding.group_size else None,
            "symmetric": spec.symmetric,
            "act_order": encoding.reordered,
            "packing": encoding.words,
            "scale_dtype": scale_dtype,
            "bias": bias,
            "experts": experts,
            "bytes": sum(module.nbytes for module in found),
            **_choose_backend(expanded, found, dtype, lack),
            "skipped": reason,
        }
        for (
            pattern,
            spec,
            encoding,
            scale_dtype,
            bias,
            experts,
            expanded,
            reason,
        ), found in alike.items()
    ]


def _choose_backend(
    expanded: bool, modules: list[QuantizedModule], dtype: str, lack: str
) -> dict[str, Any]:
    module = modules[0]
    if lack or expanded:
        features = len(modules) * module.spec.out_features * module.spec.in_features
        held = f"{_FLOATS} ({features * jnp.dtype(dtype).itemsize:,} bytes)"
        return {"backend": None, "reason": lack or held}
    choice = explain(module.spec, dtype, scale_dtype=module.tensors["weight_scale"].dtype)
    return {"backend": choice.backend, "reason": choice.reason}


def count_extra_bytes(modules: Iterable[QuantizedModule]) -> int:
    """Bytes that weights need in memory beyond those in the files.

    They come from wider integers, and from divided groups, which have a scale for each part.
    """
    bits = 0
    for module in modules:
        spec, encoding = module.spec, module.encoding
        scale_bits = 8 * module.tensors["weight_scale"].dtype.itemsize
        added = spec.groups - encoding.count_groups(spec)
        bits += spec.in_features * spec.out_features * (spec.bits - encoding.bits)
        bits += added * spec.out_features * (scale_bits + (0 if spec.symmetric else 8))
    return bits // 8


def list_tensor_rows(
    tensors: Mapping[str, TensorInfo], skipped: Mapping[str, str]
) -> list[dict[str, Any]]:
    """All other tensors by name, in the order of the files; `skipped` as in `list_module_rows`."""
    alike: dict[tuple, list[TensorInfo]] = defaultdict(list)
    for name, info in tensors.items():
        alike[make_pattern(name), info.shape, info.dtype_name, skipped.get(name, "")].append(info)
    return [
        {
            "tensors": pattern,
            "count": len(found),
            "shape": list(shape),
            "dtype": dtype,
            "bytes": sum(info.nbytes for info in found),
            "skipped": reason,
        }
        for (pattern, shape, dtype, reason), found in alike.items()
    ]


def list_absent_rows(survey: Survey) -> list[dict[str, Any]]:
    """Modules whose tensors the index names but no file has, counted by file and pattern."""
    modules = dict.fromkeys((file, split_name(name)[0]) for name, file in survey.absent.items())
    counts = Counter((file, make_pattern(path)) for file, path in modules)
    return [
        {"file": file, "modules": pattern, "count": number}
        for (file, pattern), number in counts.items()
    ]


def list_skipped(plan: Plan, skipped: Mapping[str, str]) -> list[dict[str, Any]]:
    """The parts that `load_model` leaves out, by reason."""
    alike: dict[str, list[QuantizedModule | TensorInfo]] = defaultdict(list)
    parts = {**plan.quantized, **plan.plain}
    for name, reason in skipped.items():
        if name in parts:
            alike[reason].append(parts[name])
    return [
        {
            "reason": reason,
            "modules": sum(isinstance(part, QuantizedModule) for part in found),
            "tensors": sum(isinstance(part, TensorInfo) for part in found),
            "bytes": sum(part.nbytes for part in found),
        }
        for reason, found in alike.items()
    ]


def make_pattern(name: str) -> str:
    """The name with stars for layer and expert numbers, also in "experts.down_proj[3]"."""
    name = star_numbers(name)
    return _SLICE.sub("[*]", name) if name.endswith("]") else name
