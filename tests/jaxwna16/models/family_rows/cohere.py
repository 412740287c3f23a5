"""Command R and its successors."""

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
}
