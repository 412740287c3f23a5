"""GPTQModel, as its documentation says: load with a configuration, quantize, save."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from typing import Any

# with 2 cores it would start one thread, and then miss the second that it needs to load a model
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization.config import GPTQConfig, RTNConfig
from worker import load_rows, replace_weights, save_logits

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
    model = GPTQModel.load(order["folder"], device="cpu", backend=BACKEND.TORCH)
    save_logits(order, dequantize(model.model, order))


def dequantize(model: torch.nn.Module, order: dict[str, Any]) -> torch.nn.Module:
    """A model in float32 with all that was read, and the weights that packed linears stand for."""
    weights = {
        f"{name}.weight": module.dequantize_weight().T.contiguous()
        for name, module in model.named_modules()
        if isinstance(module, BaseQuantLinear)
    }
    return replace_weights(order, model.state_dict() | weights)
