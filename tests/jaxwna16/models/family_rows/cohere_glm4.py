"""Command R and its successors, and GLM-4."""

from __future__ import annotations

from tests.jaxwna16.models.family_rows.row import Row, rope

ROWS: dict[str, Row] = {
    "cohere": Row(
        variants={"": rope("linear", factor=4.0)},
        group_size=32,
        is_repeated=True,
    ),
    "cohere2": Row(
        variants={
            "": {"sliding_window": 5, "sliding_window_pattern": 2},
            "untied, all biases, another scale": {
                "layer_types": ["full_attention", "sliding_attention"],
                "sliding_window": 6,
                "tie_word_embeddings": False,
                "attention_bias": True,
                "logit_scale": 0.5,
                "head_dim": 32,
            },
        },
        group_size=32,
        bfloat16={},
    ),
    "glm4": Row(
        variants={
            "": {"head_dim": 32},
            "whole heads, no biases, tied": {
                "head_dim": 16,
                "attention_bias": False,
                "partial_rotary_factor": 1.0,
                "tie_word_embeddings": True,
            },
        },
        group_size=32,
        bfloat16={},
    ),
}
