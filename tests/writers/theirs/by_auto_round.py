"""AutoRound, as its documentation says: one object that quantizes, and saves in a named format."""

# pyright: reportMissingImports=false
from __future__ import annotations

import copy
import os
from typing import Any

# compiling takes minutes for a model that is tuned in seconds
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from auto_round import AutoRound
from transformers import AutoTokenizer
from worker import load_model, load_rows, save_logits, widen

VERSIONS = ("auto-round",)
CAN_FORK = True


def write(order: dict[str, Any]) -> None:
    """Quantize, note the logits, and save: in the format of llm-compressor, or in its own."""
    to_nearest = not order["calibrated"]
    model, rows = load_model(order), load_rows(order)
    tuner = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(order["source"]),
        scheme="W4A16",
        sym=order["symmetric"],
        group_size=order["group_size"],
        iters=0 if to_nearest else 2,
        disable_opt_rtn=True if to_nearest else None,
        dataset=list(rows.split(1)),
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=8,
        device_map="cpu",
    )
    quantized, _ = tuner.quantize()
    save_logits(order, widen(order, copy.deepcopy(quantized), dequantize(quantized)))
    tuner.save_quantized(order["folder"], format="llm_compressor" if to_nearest else "auto_round")


def dequantize(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What was quantized, by name, rounded once: to the dtype of the scales in the file.

    AutoRound holds it in 16 bits, whose rounding is undone here: a weight is a whole multiple of
    its scale. Of all else it writes the source's own tensors.
    """
    weights = {}
    for name, module in model.named_modules():
        scale = getattr(module, "scale", None)
        weight = getattr(module, "weight", None)
        if not isinstance(scale, torch.Tensor) or not isinstance(weight, torch.Tensor):
            continue
        scale = scale.half().float().reshape(len(weight), -1, 1)
        steps = (weight.detach().float().reshape(len(weight), scale.shape[1], -1) / scale).round()
        weights[f"{name}.weight"] = (steps * scale).half().float().reshape(weight.shape)
    return weights
