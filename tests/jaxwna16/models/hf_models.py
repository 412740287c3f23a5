"""Small random transformers models, and the same model as ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.families import find_family
from jaxwna16.models.filling.params import load_params
from jaxwna16.models.llama.relatives import RELATIVES
from pallas_kernels.routing import route

torch.set_num_threads(1)  # these models are too small for more

forward = jax.jit(CausalLM.__call__)
run_hidden = jax.jit(CausalLM.hidden)
run_logits = jax.jit(CausalLM.logits)


def run_pieces(model, tokens, sizes: Sequence[int], slots: int | None = None) -> jax.Array:
    """The stream [B, S, hidden] of full rows of tokens [B, S], run in pieces of these sizes."""
    batch, length = tokens.shape
    assert sum(sizes) == length
    cache, start, pieces = model.make_cache(batch, slots or length), 0, []
    for size in sizes:
        piece = jnp.asarray(tokens[:, start : start + size])
        places = jnp.full(batch, start, jnp.int32), jnp.full(batch, size, jnp.int32)
        hidden, cache = run_hidden(model, piece, *places, cache)
        pieces.append(hidden)
        start += size
    return jnp.concatenate(pieces, axis=1)


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


EXPERTS = {"num_local_experts": 8, "num_experts": 8, "moe_intermediate_size": 48}
DEEPSEEK = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}

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
    "mixtral": ("mixtral", {"num_local_experts": 8}),
    "mixtral, window of 5, top 1 of 4": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 5, "head_dim": 32},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {**EXPERTS, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 80},
    ),
    "qwen2_moe, sparse and dense layers, renormalised": (
        "qwen2_moe",
        {
            **EXPERTS,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "shared_expert_intermediate_size": 32,
            "num_hidden_layers": 6,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 3,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True, "head_dim": 32},
    ),
    "qwen3_moe, 16 experts, top 4, tied": (
        "qwen3_moe",
        {
            **EXPERTS,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "dots1, grouped": ("dots1", {**DEEPSEEK, "sliding_window": 5, "max_window_layers": 2}),
    "dots1, one group": (
        "dots1",
        {**DEEPSEEK, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "head_dim": 32},
    ),
    "glm4_moe, grouped": ("glm4_moe", {**DEEPSEEK, "head_dim": 24, "attention_bias": True}),
    "glm4_moe, normalised heads": ("glm4_moe", {**DEEPSEEK, "use_qk_norm": True}),
}
"""Name -> (model_type, what differs from `SMALL`)."""
SPARSE = [name for name, (model_type, _) in FAMILIES.items() if RELATIVES[model_type].experts]
"""Those with experts."""


def make_reference(family: str, seed: int = 0, **changes):
    """A random float32 transformers model; biases, norms and routers are random too."""
    model_type, own = FAMILIES[family]
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **own, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, tensor in list_tensors(model):
            if tensor.ndim == 1:
                center = 1.0 if "norm" in name else 0.0
                tensor.copy_(center + 0.3 * torch.randn(tensor.shape))
            elif name.endswith("mlp.gate.weight"):
                tensor.copy_(0.3 * torch.randn(tensor.shape))
    return model.float().eval()


def list_tensors(reference) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds of a transformers model: no copy of tied weights, no frequencies."""
    yield from reference.named_parameters()
    for name, buffer in reference.named_buffers():
        if name.endswith("e_score_correction_bias"):
            yield name, buffer


def list_leaves(reference) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves of the params tree of our model; but for experts, transformers' own names."""
    for name, tensor in list_tensors(reference):
        name = name.replace(".experts.gate_up_proj", ".experts.w13.weight")
        name = name.replace(".experts.down_proj", ".experts.w2.weight")
        yield name, tensor.detach().numpy()


def nest_params(reference) -> dict:
    """The params tree of a transformers model."""
    tree: dict = {}
    for name, array in list_leaves(reference):
        *path, leaf = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = array
    return tree


def convert(reference, dtype=jnp.float32) -> CausalLM:
    """Our model with the weights of a transformers model."""
    config = reference.config.to_dict()
    family = find_family(config)
    make, config = family.open_class(), family.read(config)
    return load_params(nnx.eval_shape(lambda: make(config, dtype=dtype)), nest_params(reference))


def reference_logits(reference, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [B, S, V] of a transformers model."""
    with torch.no_grad():
        return reference(torch.from_numpy(tokens).long()).logits.float().numpy()


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SMALL["vocab_size"], shape).astype(np.int32)


def relative_error(ours, reference: np.ndarray) -> float:
    """Largest difference over the largest reference value."""
    return float(np.abs(np.asarray(ours, np.float32) - reference).max() / np.abs(reference).max())


class Routed(NamedTuple):
    """What a router saw and chose for T tokens: experts in ascending order, and their weights."""

    hidden: np.ndarray
    logits: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


def record_routers(reference, tokens: np.ndarray) -> dict[int, Routed]:
    """Run a transformers model; what each sparse layer's router saw and chose."""
    seen: dict[int, Routed] = {}

    def record(layer: int):
        def hook(_, arguments, outputs):
            hidden, (logits, weights, ids) = arguments[0], outputs
            order = ids.argsort(dim=-1)
            seen[layer] = Routed(
                hidden.reshape(-1, hidden.shape[-1]).float().numpy(),
                logits.float().numpy(),
                ids.gather(-1, order).numpy(),
                weights.gather(-1, order).float().numpy(),
            )

        return hook

    routers = {
        i: getattr(layer.mlp, "gate", None) for i, layer in enumerate(reference.model.layers)
    }
    hooks = [r.register_forward_hook(record(i)) for i, r in routers.items() if r is not None]
    reference_logits(reference, tokens)
    for hook in hooks:
        hook.remove()
    return seen


def choose_experts(
    model: CausalLM, layer: int, hidden: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The experts that our router chooses for hidden [T, H], ascending, and their weights."""
    moe = model.config.moe
    assert moe is not None
    gate = model.model.layers[layer].mlp.gate
    logits = gate(jnp.asarray(hidden, model.dtype))
    ids, weights = route(
        logits, correction_bias=gate.read_bias(), **dataclasses.asdict(moe.routing)
    )
    order = np.argsort(ids, axis=-1)
    return np.take_along_axis(np.asarray(ids), order, -1), np.take_along_axis(
        np.asarray(weights), order, -1
    )
