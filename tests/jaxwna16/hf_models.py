"""Small random transformers models, and the same model as ours."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from jaxwna16.models.config import ModelConfig
from jaxwna16.models.llama import Llama
from jaxwna16.models.params import load_params

torch.set_num_threads(1)  # these models are too small for more

forward = jax.jit(Llama.__call__)
run_hidden = jax.jit(Llama.hidden)

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def rope(rope_type: str, **parameters) -> dict:
    """A configuration change that asks for this rope."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


FAMILIES = {
    "llama": ("llama", {}),
    "llama, tied, all biases": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, one key head, wide heads": ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama, linear rope": ("llama", rope("linear", factor=4.0)),
    "llama, dynamic rope within its length": ("llama", rope("dynamic", factor=2.0)),
    "llama, dynamic rope past its length": (
        "llama",
        {**rope("dynamic", factor=4.0), "max_position_embeddings": 16},
    ),
    "llama, llama3 rope": (
        "llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama, yarn rope": (
        "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    "llama, yarn rope with mscale": (
        "llama",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            mscale=0.7,
            mscale_all_dim=1.2,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
    ),
    "mistral, window of 5": ("mistral", {"sliding_window": 5}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, second layer sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, tied, sliding, biases": (
        "qwen3",
        {
            "head_dim": 8,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
    ),
}
"""Name -> (model_type, what differs from `SMALL`)."""


def make_reference(family: str, seed: int = 0, **changes):
    """A random float32 transformers model; biases and norms are random too."""
    model_type, own = FAMILIES[family]
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **own, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                center = 1.0 if "norm" in name else 0.0
                parameter.copy_(center + 0.3 * torch.randn(parameter.shape))
    return model.float().eval()


def nest_params(reference) -> dict:
    """The params tree of a transformers model, as checkpoints hold it: no copy of tied weights."""
    tree: dict = {}
    for name, tensor in reference.named_parameters():
        *path, leaf = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = tensor.detach().numpy()
    return tree


def convert(reference, dtype=jnp.float32) -> Llama:
    """Our model with the weights of a transformers model."""
    config = ModelConfig.from_dict(reference.config.to_dict())
    abstract = nnx.eval_shape(lambda: Llama(config, dtype=dtype))
    return load_params(abstract, nest_params(reference))


def reference_logits(reference, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [B, S, V] of a transformers model."""
    with torch.no_grad():
        return reference(torch.from_numpy(tokens).long()).logits.float().numpy()


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SMALL["vocab_size"], shape).astype(np.int32)


def relative_error(ours, reference: np.ndarray) -> float:
    """Largest difference over the largest reference value."""
    return float(np.abs(np.asarray(ours, np.float32) - reference).max() / np.abs(reference).max())
