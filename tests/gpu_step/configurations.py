"""Published models as shapes: W4A16, asymmetric, groups of 128, plain heads in bfloat16."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.large_checkpoints import GROUP, SHAPES
from jaxwna16.bench.models import describe_model
from jaxwna16.models.causal_lm import CausalLM

_PUBLISHED = Path(__file__).parents[1] / "jaxwna16" / "models" / "published"
_PACKED_DELTA = "Qwen3.6-27B, all packed"


def _read(name: str) -> dict[str, Any]:
    return json.loads((_PUBLISHED / f"{name}.json").read_text())["config"]


def _describe_llama() -> dict[str, Any]:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = SHAPES["Llama 8B"].describe(symmetric=False)
    return config | {
        "rope_theta": 500000.0,
        "rope_scaling": rope,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
    }


def _pack_all() -> dict[str, Any]:
    """As the published one, but what delta nets multiply with is packed, too."""
    config = _read("qwen3.6-27b")
    quantization = config["quantization_config"]
    few = r"re:.*linear_attn.in_proj_[ab]$"
    ignore = [few if "linear_attn" in p else p for p in quantization["ignore"]]
    return config | {"quantization_config": quantization | {"ignore": ignore}}


MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "Llama-3.1-8B": _describe_llama,
    "Qwen3-30B-A3B": lambda: _read("qwen3-30b-a3b"),
    "Qwen3.6-27B": lambda: _read("qwen3.6-27b"),
    _PACKED_DELTA: _pack_all,
    "Qwen3.5-122B-A10B": lambda: _read("qwen3.5-122b-a10b"),
}
"""Name -> its config.json. Published checkpoints leave the linears of delta nets plain."""


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A model without weights.

    Attributes:
      whole_layers: of the published model; `model` may have fewer.
      kinds: of each layer, "attention" or "delta net".
    """

    model: CausalLM
    whole_layers: int
    kinds: tuple[str, ...]
    top_k: int
    experts: int


def make_abstract(name: str, layers: int | None = None, **changes: Any) -> Configuration:
    """A model of shapes, cut to its first layers if there is a number.

    `changes` are keys of the config.json (of its text model) that a test makes smaller.
    """
    config = MODELS[name]()
    whole = config.get("text_config", config)["num_hidden_layers"]
    text = config.get("text_config", config) | {"num_hidden_layers": layers or whole} | changes
    config = config | {"text_config": text} if "text_config" in config else text
    ignore = config["quantization_config"]["ignore"]
    model = describe_model(config, ignore=ignore, group_size=GROUP)
    parsed = model.config
    full = getattr(parsed, "is_full", (True,) * parsed.num_hidden_layers)
    moe = parsed.moe
    return Configuration(
        model,
        whole,
        tuple("attention" if each else "delta net" for each in full),
        moe.routing.top_k if moe else 0,
        moe.experts if moe else 0,
    )
