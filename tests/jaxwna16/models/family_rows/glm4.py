"""GLM-4."""

from __future__ import annotations

from tests.jaxwna16.models.family_rows.row import Row

ROWS: dict[str, Row] = {
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
