"""Gemma: softcaps, an embedding scale, and norms before and after each part of a layer."""

from __future__ import annotations

from tests.jaxwna16.models.family_rows.row import Row


def center_offset(name: str) -> float:
    """Weights of norms are added to 1."""
    return 0.0


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
}
