"""A row for each `model_type` that jaxwna16 has: the small models its suite compares.

`tests/jaxwna16/models/test_families.py` runs the suite, and fails where a row is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Changes = Mapping[str, Any]

SMALL: Changes = {
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


def center_plain(name: str) -> float | None:
    """Weights of norms are around 1, all other vectors around 0."""
    return 1.0 if "norm" in name else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What the tests of a `model_type` are made of.

    Attributes:
      variants: name -> what differs from `sizes` in transformers' configuration. The whole suite
        runs on the first, the others have their logits compared.
      bits, group_size, symmetric, scale_dtype: how the weights of the first are packed; a
        group_size of -1 is one group for each row.
      is_repeated: whether another row has the same layers, under other names in files; then only
        logits in pieces are always compared, and the rest thoroughly.
      ignore: patterns of what stays plain beside heads and routers.
      needed: keys for which transformers' configuration has no default.
      bfloat16: what differs in the model whose logits in bfloat16 are compared; None is no such
        test. With experts all must be chosen, since the 16-bit logits of a router may choose
        others.
      length, piece: tokens of a row, and of the pieces it is cut into.
      sizes: of the configuration.
      nest: makes transformers' configuration of the text model's, where that is one of its parts.
      center: the value around which a vector is drawn, by its name; None leaves it as transformers
        draws it.
    """

    variants: Mapping[str, Changes]
    bits: int = 4
    group_size: int = 16
    symmetric: bool = False
    scale_dtype: str = "bfloat16"
    is_repeated: bool = False
    ignore: tuple[str, ...] = ()
    needed: Changes = dataclasses.field(default_factory=dict)
    bfloat16: Changes | None = None
    length: int = 24
    piece: int = 8
    sizes: Changes = dataclasses.field(default_factory=lambda: SMALL)
    nest: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    center: Callable[[str], float | None] = center_plain


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
}

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
    "glm4_moe": Row(
        variants={
            "grouped": {**DEEPSEEK, "head_dim": 24, "attention_bias": True},
            "normalised heads": {**DEEPSEEK, "use_qk_norm": True},
        },
        scale_dtype="float32",
    ),
    "olmo2": Row(variants={"": {"attention_bias": True}}, group_size=32, bfloat16={}),
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
}


def name_model(model_type: str, variant: str) -> str:
    """The name that a small model has in tests: "llama", "llama, yarn rope"."""
    return f"{model_type}, {variant}" if variant else model_type


MODELS: dict[str, tuple[str, Changes]] = {
    name_model(model_type, variant): (model_type, changes)
    for model_type, row in ROWS.items()
    for variant, changes in row.variants.items()
}
"""Name -> model_type, what differs from the row's `sizes`."""
BASES: dict[str, str] = {
    model_type: name_model(model_type, next(iter(row.variants))) for model_type, row in ROWS.items()
}
"""model_type -> the name of its first model."""
