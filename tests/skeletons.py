"""Models without weights, for compressed-tensors to resolve a config on; names written in short."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

QUANTIZABLE = ("Linear", "Embedding")


def expand_names(names: Iterable[str]) -> list[str]:
    """["layers.{0,1}.{q,k}"] -> ["layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k"]."""
    expanded = []
    for name in names:
        parts = re.split(r"\{(.*?)\}", name)
        choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
        expanded += map("".join, itertools.product(*choices))
    return expanded


def build_skeleton(classes: Mapping[str, Iterable[str]]):
    """A torch model on the meta device, of modules by class: those of torch are the real ones.

    Containers that are not named are plain modules.
    """
    import torch

    kinds = {path: name for name, paths in classes.items() for path in paths}
    model: Any = torch.nn.Module()
    for path in sorted(kinds, key=lambda path: path.count(".")):
        parent, *names = model, *path.split(".")
        for depth, name in enumerate(names):
            if name not in parent._modules:
                kind = kinds.get(".".join(names[: depth + 1]), "Module")
                parent.add_module(name, _make_module(kind))
            parent = parent._modules[name]
    return model


def apply_config(model, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> `QuantizationScheme` of each module that compressed-tensors quantizes."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = QuantizationConfig.model_validate(quantization)
    apply_quantization_config(model, config, show_progress=False)
    return {
        path: module.quantization_scheme
        for path, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }


def _make_module(kind: str):
    import torch

    if kind in QUANTIZABLE:
        # 1024 features are divided by all sizes of groups in use
        return getattr(torch.nn, kind)(1024, 1024, device="meta")
    return type(kind, (torch.nn.Module,), {})()
