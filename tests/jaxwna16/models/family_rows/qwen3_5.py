"""Qwen3-Next, Qwen3.5 and their relatives: hybrid models, some beside a tower."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.jaxwna16.models.family_rows.row import Changes, Row

HYBRID: Changes = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
    },
}
"""A gated delta net and a layer of attention. `initializer_range` is moderate, and keys are not
short, since the norm after a delta net divides by the length of its output: where that happens to
be near 0, it magnifies whatever was rounded, in transformers' own two ways of computing it too.
"""
FOUR_LAYERS = {"num_hidden_layers": 4, "layer_types": None}
"""Three gated delta nets, and attention."""
HYBRID_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
ALONE: Changes = {
    **HYBRID,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}
"""Of a model that never had a tower. A quarter of a head is rotated, as in those published."""
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
    "patch_size": 4,
}
USUAL = ("re:.*linear_attn.*", "re:.*visual.*", "re:.*mtp.*")


def center_hybrid(name: str) -> float | None:
    """Weights of all norms but that of a delta net are added to 1."""
    if name.endswith("linear_attn.norm.weight"):
        return 1.0
    return 0.0 if name.endswith(("norm.weight", "dt_bias")) else None


def put_beside_tower(text: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a Qwen3.5 whose text model stands beside a vision tower."""
    tied = {"tie_word_embeddings": text.pop("tie_word_embeddings", False)}
    return {"text_config": text, "vision_config": VISION, **tied}


HYBRID_ROW = Row(
    variants={"": {}},
    group_size=32,
    length=70,  # longer than a chunk of the delta rule
    piece=32,
    sizes=HYBRID,
    center=center_hybrid,
)

ROWS: dict[str, Row] = {
    "qwen3_5_text": dataclasses.replace(HYBRID_ROW, bfloat16={}),
    "qwen3_5": dataclasses.replace(HYBRID_ROW, group_size=128, ignore=USUAL, nest=put_beside_tower),
    "qwen3_5_moe_text": dataclasses.replace(
        HYBRID_ROW,
        is_repeated=True,
        variants={"": {**HYBRID_EXPERTS, "attention_bias": True}},
        ignore=USUAL,
    ),
    "qwen3_5_moe": dataclasses.replace(
        HYBRID_ROW,
        variants={"": {**HYBRID_EXPERTS, "tie_word_embeddings": True}},
        group_size=128,
        ignore=("re:.*visual.*",),
        nest=put_beside_tower,
    ),
    "qwen3_next": dataclasses.replace(
        HYBRID_ROW,
        sizes=ALONE,
        variants={
            "": HYBRID_EXPERTS,
            "dense layers, not renormalised": {
                **HYBRID_EXPERTS,
                **FOUR_LAYERS,
                "decoder_sparse_step": 2,
                "mlp_only_layers": [1],
                "norm_topk_prob": False,
                "attention_bias": True,
            },
        },
    ),
}
