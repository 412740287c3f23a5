"""Gemma: softcaps, an embedding scale, and norms before and after each part of a layer."""

from __future__ import annotations

from tests.jaxwna16.models.family_rows.row import Row


def center_offset(name: str) -> float:
    """Weights of norms are added to 1."""
    return 0.0


def center_gemma4(name: str) -> float:
    """Weights of norms, scales and the number of each layer are around 1."""
    return 1.0 if "norm" in name or "scal" in name else 0.0


HEADS = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": False,  # tied, it would find its last token likeliest
}
DENSE = {**HEADS, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
BESIDE = {
    **DENSE,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
"""Experts beside the MLP."""
SHARED = {
    **HEADS,
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 128,
}
"""Layers that share keys, and embeddings of each layer."""

ROWS: dict[str, Row] = {
    "gemma2": Row(
        variants={
            "": {
                "tie_word_embeddings": False,  # tied, it would find its last token likeliest
                "head_dim": 32,
                "query_pre_attn_scalar": 4,
                "sliding_window": 5,
                "attn_logit_softcapping": 3.0,
                "final_logit_softcapping": 2.0,
            },
            "tied, biases, both layers full, no softcaps": {
                "head_dim": 16,
                "query_pre_attn_scalar": 40,
                "attention_bias": True,
                "layer_types": ["full_attention"] * 2,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
            },
        },
        group_size=32,
        center=center_offset,
        bfloat16={},
    ),
    "gemma3_text": Row(
        variants={
            "": {
                "tie_word_embeddings": False,  # tied, it would find its last token likeliest
                "head_dim": 32,
                "query_pre_attn_scalar": 40,
                "num_hidden_layers": 3,
                "sliding_window_pattern": 2,
                "sliding_window": 5,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                },
            },
            "tied, biases, capped logits, old keys": {
                "head_dim": 16,
                "query_pre_attn_scalar": 4,
                "attention_bias": True,
                "sliding_window": 4,
                "sliding_window_pattern": 2,
                "final_logit_softcapping": 2.0,
                "rope_theta": 2e3,
                "rope_local_base_freq": 50.0,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
        },
        group_size=32,
        center=center_offset,
        is_repeated=True,
    ),
    "gemma4_text": Row(
        variants={
            "": SHARED,
            "tied, biases, keys that are values, softcap, another rope": {
                **DENSE,
                "hidden_size_per_layer_input": 0,
                "tie_word_embeddings": True,
                "attention_bias": True,
                "final_logit_softcapping": 2.0,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                },
            },
            "experts": BESIDE,
        },
        group_size=32,
        symmetric=True,
        center=center_gemma4,
        bfloat16={},
    ),
    "gemma4_unified_text": Row(
        variants={"": {**DENSE, "final_logit_softcapping": 2.0}},
        group_size=32,
        is_repeated=True,
        center=center_gemma4,
    ),
}
