"""Llama and its relatives."""

from __future__ import annotations

from tests.jaxwna16.models.family_rows.row import Row, rope

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
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.4,
    "logits_scaling": 6.5,
}
"""Of Granite."""
ERNIE = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 64}


def scaled_queries(beta: float) -> dict:
    """The rope of a Ministral 3 that was made for 8 tokens first."""
    mscales = {"mscale": 1.0, "mscale_all_dim": 1.0}
    original = {"original_max_position_embeddings": 8, "llama_4_scaling_beta": beta}
    return rope("yarn", factor=16.0, **mscales, **original)


def longrope(original: int, **parameters) -> dict:
    """A configuration change that asks for longrope on three quarters of heads of 16 features."""
    return {
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 3.0],
            "long_factor": [1.5, 2.0, 3.0, 5.0, 9.0, 20.0],
            **parameters,
        },
    }


ROWS: dict[str, Row] = {
    "llama": Row(
        variants={
            "": {},
            "tied, all biases": {
                "tie_word_embeddings": True,
                "attention_bias": True,
                "mlp_bias": True,
            },
            "one key head, wide heads": {"num_key_value_heads": 1, "head_dim": 32},
            "linear rope": rope("linear", factor=4.0),
            "dynamic rope within its length": rope("dynamic", factor=2.0),
            "dynamic rope past its length": {
                **rope("dynamic", factor=4.0),
                "max_position_embeddings": 16,
            },
            "llama3 rope": rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
            "yarn rope": rope("yarn", factor=4.0, original_max_position_embeddings=32),
            "yarn rope with mscale": rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=32,
                mscale=0.7,
                mscale_all_dim=1.2,
                beta_fast=16.0,
                beta_slow=2.0,
                truncate=False,
            ),
        },
        bfloat16={"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": Row(
        variants={"window of 5": {"sliding_window": 5}, "no window": {"sliding_window": None}},
        group_size=-1,
        symmetric=True,
    ),
    "phi3": Row(
        variants={
            "longrope within its length": longrope(32),
            "longrope past its length": longrope(16),
            "longrope with its own factor, window of 5": {
                **longrope(64, attention_factor=1.7),
                "sliding_window": 5,
            },
            "all of a head rotated": {},
        },
        group_size=32,
        bfloat16=longrope(16),
    ),
    "qwen2": Row(
        variants={
            "second layer sliding": {
                "use_sliding_window": True,
                "sliding_window": 5,
                "max_window_layers": 1,
            },
            "": {},
        },
        group_size=32,
        scale_dtype="float32",
    ),
    "qwen3": Row(
        variants={
            "": {"head_dim": 32},
            "tied, sliding, biases": {
                "head_dim": 8,
                "tie_word_embeddings": True,
                "attention_bias": True,
                "use_sliding_window": True,
                "sliding_window": 6,
                "max_window_layers": 1,
            },
        },
        bits=8,
        group_size=32,
        scale_dtype="float16",
        bfloat16={},
    ),
    "smollm3": Row(
        variants={
            "": {"num_hidden_layers": 4},
            "untied, all biases, other layers without rope": {
                "tie_word_embeddings": False,
                "attention_bias": True,
                "mlp_bias": True,
                "no_rope_layers": [0, 1, 0],
                "num_hidden_layers": 3,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "use_sliding_window": True,
                "sliding_window": 5,
            },
            "windows where there is no rope": {
                "no_rope_layer_interval": 2,
                "use_sliding_window": True,
                "sliding_window": 5,
            },
        },
        group_size=32,
    ),
    "seed_oss": Row(
        is_repeated=True,
        variants={
            "": {"head_dim": 32},
            "all biases, its own head_dim": {
                "head_dim": None,
                "attention_out_bias": True,
                "mlp_bias": True,
            },
            "no biases": {"head_dim": 16, "attention_bias": False},
        },
        group_size=32,
    ),
    "ernie4_5": Row(
        is_repeated=True,
        variants={
            "": {"head_dim": 32},
            "all biases, not tied": {
                "head_dim": 16,
                "use_bias": True,
                "tie_word_embeddings": False,
            },
        },
        group_size=32,
        bfloat16={},
    ),
    "hunyuan_v1_dense": Row(
        is_repeated=True,
        variants={
            "": {"head_dim": 32},
            "tied, all biases": {
                "head_dim": 16,  # without it, transformers fails
                "tie_word_embeddings": True,
                "attention_bias": True,
            },
            "stretched rope": {**rope("dynamic", alpha=50.0, factor=1.0), "head_dim": 16},
        },
        group_size=32,
        bfloat16={},
    ),
    "mixtral": Row(
        variants={
            "": {"num_local_experts": 8},
            "window of 5, top 1 of 4": {
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "sliding_window": 5,
                "head_dim": 32,
            },
        },
        bfloat16={"num_experts_per_tok": 8},
    ),
    "qwen2_moe": Row(
        variants={
            "": {**EXPERTS, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 80},
            "sparse and dense layers, renormalised": {
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
        },
        bits=8,
        group_size=-1,
        scale_dtype="float32",
    ),
    "qwen3_moe": Row(
        variants={
            "": {**EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True, "head_dim": 32},
            "16 experts, top 4, tied": {
                **EXPERTS,
                "num_experts": 16,
                "num_experts_per_tok": 4,
                "tie_word_embeddings": True,
                "attention_bias": True,
                "use_sliding_window": True,
                "sliding_window": 6,
            },
        },
        bits=8,
    ),
    "olmoe": Row(
        is_repeated=True,
        variants={
            "": {"num_experts": 8, "num_experts_per_tok": 2},
            "renormalised, all biases": {
                "num_experts": 4,
                "num_experts_per_tok": 3,
                "norm_topk_prob": True,
                "attention_bias": True,
            },
        },
        group_size=32,
    ),
    "dots1": Row(
        needed={"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
        variants={
            "grouped": {**DEEPSEEK, "sliding_window": 5, "max_window_layers": 1},
            "one group": {
                **DEEPSEEK,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": False,
                "head_dim": 32,
            },
        },
    ),
    "ernie4_5_moe": Row(
        is_repeated=True,
        variants={
            "": {**ERNIE, "head_dim": 32, "tie_word_embeddings": False},
            "every other layer sparse, none shared": {
                **ERNIE,
                "num_hidden_layers": 4,
                "moe_num_shared_experts": 0,
                "moe_layer_interval": 2,
                "moe_layer_end_index": 2,
            },
        },
        group_size=32,
        bfloat16={"moe_k": 8},
    ),
    "hunyuan_v1_moe": Row(
        is_repeated=True,
        variants={
            "": {"num_experts": 8, "moe_topk": 2, "head_dim": 32},
            "a list of top 3 of 4": {"num_experts": 4, "moe_topk": [3, 3], "head_dim": 16},
        },
        group_size=32,
    ),
    "glm4_moe": Row(
        variants={
            "grouped": {**DEEPSEEK, "head_dim": 24, "attention_bias": True},
            "normalised heads": {**DEEPSEEK, "use_qk_norm": True},
        },
        scale_dtype="float32",
    ),
    "granite": Row(
        variants={
            "": MULTIPLIERS,
            "tied, all biases, no multipliers": {
                "tie_word_embeddings": True,
                "attention_bias": True,
                "mlp_bias": True,
            },
        },
        group_size=32,
        is_repeated=True,
    ),
    "minimax_m2": Row(
        is_repeated=True,
        variants={
            "": {
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "head_dim": 32,
                "rotary_dim": 8,
            },
            "whole heads rotated": {"num_local_experts": 4, "num_experts_per_tok": 1},
        },
        group_size=32,
        bfloat16={"num_experts_per_tok": 8},
    ),
    "granitemoe": Row(
        variants={
            "": {**MULTIPLIERS, "num_local_experts": 8},
            "top 1 of 4, all biases, no multipliers": {
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "attention_bias": True,
            },
        },
        group_size=32,
        is_repeated=True,
    ),
    "ministral3": Row(
        variants={
            "queries scaled from 8 tokens on": {"head_dim": 32, **scaled_queries(0.5)},
            "window of 5": {"sliding_window": 5, **scaled_queries(0.3)},
        },
        group_size=32,
        bfloat16={},
    ),
}
