"""Checkpoints with the shapes of known models and random words: W4A16, groups of 128."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxwna16.checkpoints.quantize_plan import describe_quantization
from loaders.files.new_folder import build_folder

GROUP = 128
_SHARD_BYTES = 1_000_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A model: its config.json, as far as it decides shapes. `experts` is 0 in a dense one."""

    model_type: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    experts: int = 0
    top_k: int = 0

    def describe(self, symmetric: bool) -> dict[str, Any]:
        """The config.json."""
        moe = {
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.inner,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
        }
        return {
            "architectures": ["Qwen3MoeForCausalLM" if self.experts else "LlamaForCausalLM"],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "dtype": "bfloat16",
            **(moe if self.experts else {}),
            "quantization_config": describe_quantization(
                4, GROUP, symmetric, ["lm_head", "re:.*mlp.gate$"]
            ),
        }

    def list_linears(self, layer: str) -> Iterator[tuple[str, int, int]]:
        """Path, out and in features of the quantized linears of a layer."""
        q, kv = 128 * self.heads, 128 * self.kv_heads
        yield f"{layer}.self_attn.q_proj", q, self.hidden
        yield f"{layer}.self_attn.k_proj", kv, self.hidden
        yield f"{layer}.self_attn.v_proj", kv, self.hidden
        yield f"{layer}.self_attn.o_proj", self.hidden, q
        experts = [f".experts.{i}" for i in range(self.experts)] or [""]
        for expert in experts:
            yield f"{layer}.mlp{expert}.gate_proj", self.inner, self.hidden
            yield f"{layer}.mlp{expert}.up_proj", self.inner, self.hidden
            yield f"{layer}.mlp{expert}.down_proj", self.hidden, self.inner

    def list_plain(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of the tensors that are not quantized."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        for layer in self.list_layers():
            yield f"{layer}.input_layernorm.weight", (self.hidden,)
            yield f"{layer}.post_attention_layernorm.weight", (self.hidden,)
            if self.experts:
                yield f"{layer}.mlp.gate.weight", (self.experts, self.hidden)
            if self.model_type == "qwen3_moe":
                yield f"{layer}.self_attn.q_norm.weight", (128,)
                yield f"{layer}.self_attn.k_norm.weight", (128,)

    def list_layers(self) -> list[str]:
        """Paths of the layers."""
        return [f"model.layers.{i}" for i in range(self.layers)]


_LLAMA = Shape(
    model_type="llama",
    hidden=4096,
    inner=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    vocabulary=128256,
    tied=False,
)
SHAPES = {
    "Llama 2 GB": dataclasses.replace(_LLAMA, layers=18, vocabulary=1024, tied=True),
    "Llama 8B": _LLAMA,
    "Qwen3-30B-A3B, 4 layers": Shape(
        model_type="qwen3_moe",
        hidden=2048,
        inner=768,
        layers=4,
        heads=32,
        kv_heads=4,
        vocabulary=1024,
        tied=True,
        experts=128,
        top_k=8,
    ),
}


def write_checkpoint(folder: Path, shape: Shape, symmetric: bool) -> None:
    """Write a folder, shard by shard."""
    numbers = np.random.default_rng(0)
    with build_folder(folder) as partial:
        shard: dict[str, np.ndarray] = {}
        weight_map: dict[str, str] = {}

        def flush() -> None:
            name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, partial / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, name))
            shard.clear()

        for tensors in _make_tensors(shape, symmetric, numbers):
            shard |= tensors
            if sum(array.nbytes for array in shard.values()) > _SHARD_BYTES:
                flush()
        flush()
        index = {"metadata": {}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index))
        (partial / "config.json").write_text(json.dumps(shape.describe(symmetric)))


def _make_tensors(
    shape: Shape, symmetric: bool, numbers: np.random.Generator
) -> Iterator[dict[str, np.ndarray]]:
    """Module by module, and all plain tensors one by one."""
    for name, size in shape.list_plain():
        # the same values again and again: to draw a billion would take a minute
        values = numbers.standard_normal(size[-1], np.float32).astype(ml_dtypes.bfloat16)
        yield {name: np.array(np.broadcast_to(values, size))}
    for layer in shape.list_layers():
        for path, n, k in shape.list_linears(layer):
            scale = numbers.uniform(0.001, 0.01, (n, k // GROUP))
            module = {
                f"{path}.weight_packed": _draw_words(numbers, n, k // 8),
                f"{path}.weight_scale": scale.astype(ml_dtypes.bfloat16),
                f"{path}.weight_shape": np.array([n, k]),
            }
            if not symmetric:
                module[f"{path}.weight_zero_point"] = _draw_words(numbers, n // 8, k // GROUP)
            yield module


def _draw_words(numbers: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.frombuffer(numbers.bytes(4 * rows * columns), np.int32).reshape(rows, columns)
