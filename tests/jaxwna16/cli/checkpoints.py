"""A small random Llama checkpoint with a byte-level tokenizer, and ways to damage one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

END = 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "eos_token_id": END,
}
CHAT = "{% for message in messages %}[{{ message.content }}]{% endfor %}"


def write_float_checkpoint(folder: Path) -> None:
    """Write the checkpoint that is not quantized."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(_make_tensors(), folder / "model.safetensors")
    _make_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def edit_config(folder: Path, edit: Callable[[dict], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def _make_tensors() -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return (0.2 * numbers.standard_normal(shape)).astype(np.float32)

    def norm() -> np.ndarray:
        return np.ones(64, np.float32)

    tensors = {"model.embed_tokens.weight": draw(257, 64), "model.norm.weight": norm()}
    tensors["lm_head.weight"] = draw(257, 64)
    for layer in ("model.layers.0", "model.layers.1"):
        tensors |= {
            f"{layer}.input_layernorm.weight": norm(),
            f"{layer}.post_attention_layernorm.weight": norm(),
            f"{layer}.self_attn.q_proj.weight": draw(64, 64),
            f"{layer}.self_attn.k_proj.weight": draw(32, 64),
            f"{layer}.self_attn.v_proj.weight": draw(32, 64),
            f"{layer}.self_attn.o_proj.weight": draw(64, 64),
            f"{layer}.mlp.gate_proj.weight": draw(96, 64),
            f"{layer}.mlp.up_proj.weight": draw(96, 64),
            f"{layer}.mlp.down_proj.weight": draw(64, 96),
        }
    return tensors


def _make_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte, in the order of GPT-2's alphabet."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer
