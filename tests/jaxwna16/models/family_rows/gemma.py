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
                "head_dim": 32,
                "query_pre_attn_scalar": 4,
                "sliding_window": 5,
                "attn_logit_softcapping": 3.0,
                "final_logit_softcapping": 2.0,
            },
            "untied, biases, both layers full, no softcaps": {
                "head_dim": 16,
                "query_pre_attn_scalar": 40,
                "tie_word_embeddings": False,
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
}
