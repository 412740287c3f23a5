"""OLMo 2 and its relatives."""

from __future__ import annotations

from tests.jaxwna16.models.family_rows.row import Row

SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

ROWS: dict[str, Row] = {
    "olmo2": Row(variants={"": {"attention_bias": True}}, group_size=32, bfloat16={}),
    "olmo3": Row(
        variants={
            "": {
                "num_hidden_layers": 4,
                "sliding_window": 5,
                "rope_scaling": {"attention_factor": 1.2, **YARN},
            },
            "two bases, first layer full, biases": {
                "layer_types": [FULL, SLIDING],
                "sliding_window": 6,
                "attention_bias": True,
                "rope_parameters": {
                    SLIDING: {"rope_type": "default", "rope_theta": 1e3},
                    FULL: {"rope_theta": 1e5, **YARN},
                },
            },
        },
        group_size=32,
        is_repeated=True,
    ),
    "exaone4": Row(
        variants={
            "": {"sliding_window": 5, "sliding_window_pattern": 2},
            "letters beside a list, wide heads, llama3 rope": {
                "layer_types": [FULL, SLIDING],
                "sliding_window": 6,
                "sliding_window_pattern": "LLLG",
                "head_dim": 32,
                "tie_word_embeddings": True,
                "rope_parameters": {"rope_theta": 1e6, **LLAMA3},
            },
            "no window, rope everywhere": {"sliding_window": None, "layer_types": [FULL, FULL]},
        },
        group_size=32,
        is_repeated=True,
    ),
}
