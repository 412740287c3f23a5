"""Published models of full size: their configurations, and checkpoints of nothing but headers.

Names and shapes are those of transformers' own model on torch's meta device, and what is quantized
there is what the configuration's `ignore` leaves.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.sparse import Described, describe_linear, write_sparse

FOLDER = Path(__file__).parent / "published"
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.json")))
_TENSORS_A_FILE = 20_000
_MIXTRAL = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_FILE_NAMES = {"minimax_m2": _MIXTRAL}
"""What stands in files in place of transformers' own names."""
_KNOWN_AS = {"kimi_k2": "deepseek_v3"}
"""What transformers calls a model that comes with code of its own."""


def read_published(name: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a published model, cut to its first layers if there is a number."""
    config = copy.deepcopy(json.loads((FOLDER / f"{name}.json").read_text())["config"])
    if layers is not None:
        config.get("text_config", config)["num_hidden_layers"] = layers
    return config


def read_bytes(name: str) -> float:
    """How large the model is in bfloat16, as its source says."""
    return json.loads((FOLDER / f"{name}.json").read_text())["source"]["bfloat16_bytes"]


def write_headers(folder: Path, config: dict[str, Any]) -> Path:
    """Write a packed checkpoint of a configuration, of which no file has contents."""
    parts: list[dict[str, Any]] = [{}]
    for tensors in _describe(config):
        if len(parts[-1]) > _TENSORS_A_FILE:
            parts.append({})
        parts[-1].update(tensors)
    return write_sparse(folder, config, parts)


def _describe(config: dict[str, Any]) -> Iterator[Described]:
    quantization = config["quantization_config"]
    weights = quantization["config_groups"]["group_0"]["weights"]
    facts = weights["group_size"], weights["symmetric"]
    ignore = [
        re.compile(p.removeprefix("re:") if p.startswith("re:") else re.escape(p) + "$")
        for p in quantization["ignore"]
    ]
    changes = _FILE_NAMES.get(config["model_type"], {})
    for path, shape, is_linear in _list_weights(config):
        for found, there in changes.items():
            path = path.replace(found, there)
        if is_linear and not any(pattern.match(path) for pattern in ignore):
            yield describe_linear(path, *shape, *facts)
        else:
            yield {f"{path}.weight" if is_linear else path: ("BF16", shape)}


def _list_weights(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Linears by path, other tensors by name; their shapes, and which they are."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    known = _KNOWN_AS.get(config["model_type"], config["model_type"])
    parsed = transformers.AutoConfig.for_model(**{**plain, "model_type": known})
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])._from_config(parsed)
    linears = {
        f"{path}.weight": path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    held = ("_correction_bias", "layer_scalar")
    biases = [pair for pair in model.named_buffers() if pair[0].endswith(held)]
    # a head that is tied by the class alone is in the published files
    is_tied = config.get("tie_word_embeddings", False)
    for name, tensor in [*model.named_parameters(remove_duplicate=is_tied), *biases]:
        shape = tuple(tensor.shape)
        if ".experts." in name:  # llm-compressor takes stacks apart, as transformers saves them
            yield from _separate(name, shape)
        elif name in linears:
            yield linears[name], shape, True
        else:
            yield name, shape, False
    if "mtp_num_hidden_layers" in config.get("text_config", {}):
        yield from _list_prediction(config["text_config"])


def _separate(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    path, _, kind = name.rpartition(".")
    experts, rows, columns = shape
    for i in range(experts):
        if kind == "down_proj":
            yield f"{path}.{i}.down_proj", (rows, columns), True
        else:
            yield f"{path}.{i}.gate_proj", (rows // 2, columns), True
            yield f"{path}.{i}.up_proj", (rows // 2, columns), True


def _list_prediction(text: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """The layer that predicts a second token, which transformers has no module for."""
    hidden, head = text["hidden_size"], text["head_dim"]
    q, kv = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    layer = "mtp.layers.0"
    shapes = {
        "mtp.fc": (hidden, 2 * hidden),
        "mtp.norm": (hidden,),
        "mtp.pre_fc_norm_embedding": (hidden,),
        "mtp.pre_fc_norm_hidden": (hidden,),
        f"{layer}.input_layernorm": (hidden,),
        f"{layer}.post_attention_layernorm": (hidden,),
        f"{layer}.self_attn.q_proj": (2 * q, hidden),
        f"{layer}.self_attn.k_proj": (kv, hidden),
        f"{layer}.self_attn.v_proj": (kv, hidden),
        f"{layer}.self_attn.o_proj": (hidden, q),
        f"{layer}.self_attn.q_norm": (head,),
        f"{layer}.self_attn.k_norm": (head,),
    }
    if "num_experts" not in text:
        inner = text["intermediate_size"]
        shapes |= {f"{layer}.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj"] = (hidden, inner)
    else:
        experts, inner = text["num_experts"], text["moe_intermediate_size"]
        shared = text["shared_expert_intermediate_size"]
        shapes |= {
            f"{layer}.mlp.gate": (experts, hidden),
            f"{layer}.mlp.shared_expert_gate": (1, hidden),
            f"{layer}.mlp.shared_expert.gate_proj": (shared, hidden),
            f"{layer}.mlp.shared_expert.up_proj": (shared, hidden),
            f"{layer}.mlp.shared_expert.down_proj": (hidden, shared),
        }
        yield f"{layer}.mlp.experts.gate_up_proj", (experts, 2 * inner, hidden), False
        yield f"{layer}.mlp.experts.down_proj", (experts, hidden, inner), False
    for path, shape in shapes.items():
        yield f"{path}.weight", shape, False
