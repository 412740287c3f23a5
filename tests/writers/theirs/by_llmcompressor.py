"""llm-compressor, as its documentation says: modifiers that are applied once, then saved packed."""

# pyright: reportMissingImports=false
from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import transformers
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoTokenizer
from worker import load_model, load_rows, save_logits, widen

VERSIONS = ("llmcompressor", "compressed-tensors")
CAN_FORK = True
USUAL = ["lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$", "re:.*shared_expert_gate$"]
"""What its examples leave as it is."""


def write(order: dict[str, Any]) -> None:
    """Quantize, note the logits, and save in the compressed format."""
    forget_image_processing()
    with load_quantizable_moe(getattr(transformers, order["class"])):
        model = load_model(order)
    channel = order["group_size"] == -1
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": order["symmetric"],
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else order["group_size"],
    }
    facts = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [*USUAL, *order["ignore"]],
    }
    if not order["calibrated"]:
        oneshot(model=model, recipe=QuantizationModifier(**facts))
    else:
        rows = load_rows(order)
        columns = {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
        oneshot(
            model=model,
            recipe=GPTQModifier(**facts),
            dataset=Dataset.from_dict(columns),
            processor=AutoTokenizer.from_pretrained(order["source"]),
            num_calibration_samples=len(rows),
            max_seq_length=rows.shape[1],
        )
    rounded = dequantize(model)
    save_logits(order, widen(order, rounded, dict(rounded.named_parameters())))
    model.save_pretrained(order["folder"], save_compressed=True)


def forget_image_processing() -> None:
    """Without torchvision, transformers cannot list what is in its aliases of such modules.

    It does list them where experts are to be loaded one by one. torchvision's builds for a torch
    without CUDA are in no ordinary index.
    """
    for name in list(sys.modules):
        if name.startswith("transformers.models.") and name.endswith("_fast"):
            del sys.modules[name]


def dequantize(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose weights are rounded to what will be saved, and which rounds no more itself."""
    model = copy.deepcopy(model)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        with torch.no_grad():
            module.weight.copy_(
                fake_quantize(
                    module.weight,
                    module.weight_scale,
                    getattr(module, "weight_zero_point", None),
                    scheme.weights,
                )
            )
        module.quantization_enabled = False
    return model
