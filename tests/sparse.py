"""Checkpoints of full size that are nothing but headers: the files behind them are holes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loaders.files.folder import INDEX

Described = Mapping[str, tuple[str, Sequence[int]]]
"""Name of each tensor -> its dtype in safetensors' terms and its shape."""
_BYTES = {"I32": 4, "I64": 8, "BF16": 2}


def describe_linear(
    path: str, n: int, k: int, group_size: int = 128, symmetric: bool = False
) -> Described:
    """A 4-bit linear layer."""
    zero_point = {f"{path}.weight_zero_point": ("I32", (n // 8, k // group_size))}
    return {
        f"{path}.weight_packed": ("I32", (n, k // 8)),
        f"{path}.weight_scale": ("BF16", (n, k // group_size)),
        f"{path}.weight_shape": ("I64", (2,)),
        **({} if symmetric else zero_point),
    }


def describe_llama(
    layers: int, hidden: int, inner: int, kv: int, vocabulary: int
) -> list[Described]:
    """The tensors of a packed Llama: one dict for each layer, and one for all else."""
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    parts: list[Described] = [
        {
            "model.embed_tokens.weight": ("BF16", (vocabulary, hidden)),
            "model.norm.weight": ("BF16", (hidden,)),
            "lm_head.weight": ("BF16", (vocabulary, hidden)),
        }
    ]
    for i in range(layers):
        layer = f"model.layers.{i}"
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors = {f"{layer}.{norm}.weight": ("BF16", (hidden,)) for norm in norms}
        for name, (n, k) in shapes.items():
            tensors |= describe_linear(f"{layer}.{name}", n, k)
        parts.append(tensors)
    return parts


def write_sparse(folder: Path, config: Mapping[str, Any], parts: Iterable[Described]) -> Path:
    """Write config.json, the index and a file for each part."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for i, tensors in enumerate(parts):
        header, position = {}, 0
        for name, (dtype, shape) in tensors.items():
            end = position + _BYTES[dtype] * math.prod(shape)
            entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            header[name], position = entry, end
        file, text = f"model-{i:05}.safetensors", json.dumps(header).encode()
        with (folder / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + position)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder
