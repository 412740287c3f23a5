"""SmolLM2-135M-Instruct with its first layers alone: real weights in a fraction of the memory.

They have every kind of tensor of all thirty. `make thorough` takes all, as `make demo` does.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from examples.fetch_smollm2 import fetch
from examples.make_moe import find_layer

DEPTHS = [4, pytest.param(30, marks=pytest.mark.thorough)]
"""How many layers a test of the real model takes."""


def write_layers(layers: int, folder: Path) -> Path:
    """Write a checkpoint of the first `layers` into a new folder, and return that."""
    source = fetch()
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, folder)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with safe_open(source / "model.safetensors", "numpy") as file:
        kept = [n for n in file.keys() if (find_layer(n) or 0) < layers]
        tensors = {name: file.get_tensor(name) for name in kept}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def compute_perplexity(logits: np.ndarray, tokens: list[int]) -> float:
    """By torch in float64, of logits [windows, window, V], as the mean over the scored tokens."""
    rows = torch.tensor(tokens).reshape(logits.shape[:2])
    losses = [
        torch.nn.functional.cross_entropy(torch.from_numpy(scored[:-1]).double(), row[1:]).item()
        for scored, row in zip(logits, rows, strict=True)  # all of them at once are 200 MB
    ]
    return math.exp(sum(losses) / len(losses))
