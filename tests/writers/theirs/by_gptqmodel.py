"""GPTQModel, as its documentation says: load with a configuration, quantize, save."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# with 2 cores it would start one thread, and then miss the second that it needs to load a model
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization.config import GPTQConfig, RTNConfig
from safetensors.torch import load_file
from worker import load_rows, save_logits, widen

VERSIONS = ("gptqmodel",)
CAN_FORK = False  # its threads start with its import


def write(order: dict[str, Any]) -> None:
    """Quantize and save; then read it back, and note the logits of what was read."""
    make = GPTQConfig if order["calibrated"] else RTNConfig
    config = make(
        bits=4,
        group_size=order["group_size"],
        sym=order["symmetric"],
        offload_to_disk=False,
        device="cpu",
    )
    model = GPTQModel.load(order["source"], config)
    rows = load_rows(order) if order["calibrated"] else []
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows])
    model.save(order["folder"])
    # float16 is the dtype of scales in its files; in another one it would round them
    model = GPTQModel.load(
        order["folder"], device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
    )
    tensors = {}
    for path in Path(order["folder"]).glob("*.safetensors"):
        tensors |= load_file(path)
    weights = dequantize(model.model)
    save_logits(order, widen(order, model.model, tensors | weights))


def dequantize(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Put linears of floats in place of the packed ones; their weights, by name."""
    weights = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseQuantLinear):
            weight = module.dequantize_weight().T.contiguous()
            linear = torch.nn.Linear(*weight.shape[::-1], bias=module.bias is not None)
            linear.weight.data = weights[f"{name}.weight"] = weight
            if module.bias is not None:
                linear.bias.data = module.bias.detach()
            model.set_submodule(name, linear)
    return weights
