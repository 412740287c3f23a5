"""Text models beside towers, whose layers are those of other rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.jaxwna16.models.family_rows.deepseek import LATENT
from tests.jaxwna16.models.family_rows.gemma import BESIDE, DENSE, center_gemma4, center_offset
from tests.jaxwna16.models.family_rows.llama import DEEPSEEK, EXPERTS, scaled_queries
from tests.jaxwna16.models.family_rows.row import Changes, Row, rope

USUAL = ("re:.*visual.*", "re:.*vision_tower.*", "re:.*multi_modal_projector.*")
NO_TOKEN = 200
"""Behind the vocabulary of small models, whose tokens are drawn from all of it."""
QWEN3_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "patch_size": 4,
    "deepstack_visual_indexes": [0],
}
QWEN2_VISION = {
    "depth": 1,
    "embed_dim": 32,
    "hidden_size": 64,
    "mlp_ratio": 2,
    "num_heads": 2,
    "patch_size": 4,
}
QWEN2_5_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "fullatt_block_indexes": [0],
}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 16,
    "patch_size": 4,
}


def put_beside(
    vision: Changes, text_type: str | None = None, image: str = "image_token_id"
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Makes the configuration of a whole from that of its text model.

    Args:
      vision: of the tower.
      text_type: where the wrapper has several.
      image: the key of the token of an image.
    """

    def nest(text: dict[str, Any]) -> dict[str, Any]:
        tied = text.pop("tie_word_embeddings", False)
        text |= {} if text_type is None else {"model_type": text_type}
        parts = {"text_config": text, "vision_config": dict(vision)}
        return {**parts, "tie_word_embeddings": tied, image: NO_TOKEN}

    return nest


def mrope(rope_type: str = "default", **parameters: Any) -> dict[str, Any]:
    """Rope that deals 8 frequencies out to three positions."""
    return rope(rope_type, mrope_section=[4, 2, 2], **parameters)


INTERLEAVED = mrope(mrope_interleaved=True)
GLM_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "image_size": 8,
    "patch_size": 4,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
INTERN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": [8, 8],
    "patch_size": [4, 4],
}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
GEMMA4_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 16,
}
KIMI_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "pos_emb_time": 2,
}
KIMI_IGNORE = (
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    "re:.*vision_tower.*",
    "re:.*mm_projector.*",
)
"""Of Kimi K2: its routed experts alone are packed."""
AUDIO = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 8,
    "output_dim": 64,
}


def put_into_thinker(vision: Changes) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Makes the configuration of a thinker, which also hears."""
    nest = put_beside(vision)
    return lambda text: {**nest(text), "audio_config": AUDIO}


ROWS: dict[str, Row] = {
    "qwen2_vl": Row(
        variants={"": mrope()},
        is_repeated=True,
        ignore=USUAL,
        nest=put_beside(QWEN2_VISION),
    ),
    "qwen2_5_vl": Row(
        variants={
            "": {**mrope(), "tie_word_embeddings": True},
            "second layer sliding, yarn": {
                **mrope("yarn", factor=4.0, original_max_position_embeddings=32),
                "use_sliding_window": True,
                "sliding_window": 5,
                "max_window_layers": 1,
            },
        },
        group_size=32,
        is_repeated=True,
        ignore=USUAL,
        nest=put_beside(QWEN2_5_VISION),
    ),
    "qwen3_vl": Row(
        variants={
            "": {**INTERLEAVED, "head_dim": 16},
            "tied, biases": {
                **INTERLEAVED,
                "head_dim": 16,
                "tie_word_embeddings": True,
                "attention_bias": True,
            },
        },
        group_size=32,
        is_repeated=True,
        ignore=USUAL,
        nest=put_beside(QWEN3_VISION),
    ),
    "qwen3_vl_moe": Row(
        variants={"": {**INTERLEAVED, **EXPERTS, "num_experts_per_tok": 3, "head_dim": 16}},
        group_size=16,
        is_repeated=True,
        ignore=USUAL,
        nest=put_beside(QWEN3_VISION),
    ),
    "mistral3": Row(
        variants={
            "ministral3": {"head_dim": 16, **scaled_queries(0.5)},
        },
        group_size=32,
        is_repeated=True,
        ignore=USUAL,
        nest=put_beside(PIXTRAL, "ministral3", image="image_token_index"),
    ),
    "qwen2_5_omni_thinker": Row(
        variants={"": mrope()},
        is_repeated=True,
        ignore=("re:.*visual.*", "re:.*audio_tower.*"),
        nest=put_into_thinker(QWEN2_5_VISION),
    ),
    "qwen3_omni_moe_thinker": Row(
        variants={
            "": {**INTERLEAVED, **EXPERTS, "num_experts_per_tok": 3, "norm_topk_prob": False},
            "renormalised by default, dense layers": {
                **INTERLEAVED,
                **EXPERTS,
                "num_experts_per_tok": 2,
                "mlp_only_layers": [0],
            },
        },
        is_repeated=True,
        ignore=("re:.*visual.*", "re:.*audio_tower.*"),
        nest=put_into_thinker(QWEN3_VISION),
    ),
    "internvl": Row(
        variants={"": {"head_dim": 16}},
        is_repeated=True,
        ignore=USUAL,
        nest=put_beside(INTERN_VISION, "qwen3"),
    ),
    "glm4v": Row(
        variants={
            "": rope("default", mrope_section=[2, 1, 1], partial_rotary_factor=0.5),
            "whole heads, tied": {**mrope(), "tie_word_embeddings": True},
        },
        group_size=32,
        is_repeated=True,
        ignore=USUAL,
        nest=put_beside(GLM_VISION),
    ),
    "glm4v_moe": Row(
        variants={
            "": {**DEEPSEEK, **rope("default", mrope_section=[2, 1, 1], partial_rotary_factor=0.5)}
        },
        is_repeated=True,
        ignore=USUAL,
        nest=put_beside(GLM_VISION),
    ),
    "gemma3": Row(
        variants={
            "": {"head_dim": 16, "sliding_window": 5, "sliding_window_pattern": 2},
            "tied": {"head_dim": 16, "sliding_window": 5, "tie_word_embeddings": True},
        },
        group_size=32,
        is_repeated=True,
        ignore=USUAL,
        nest=put_beside(SIGLIP, "gemma3_text", image="image_token_index"),
        center=center_offset,
    ),
    "gemma4": Row(
        variants={"": BESIDE},
        group_size=32,
        symmetric=True,
        ignore=("re:.*vision_tower.*", "re:.*embed_vision.*"),
        nest=put_beside(GEMMA4_VISION, "gemma4_text"),
        center=center_gemma4,
    ),
    "gemma4_unified": Row(
        variants={"": DENSE},
        group_size=32,
        is_repeated=True,
        nest=put_beside({}, "gemma4_unified_text"),
        center=center_gemma4,
    ),
    "llava": Row(
        variants={"": {}},
        is_repeated=True,
        ignore=USUAL,
        nest=put_beside(CLIP, "llama", image="image_token_index"),
    ),
    "llava_next": Row(
        variants={"": {"sliding_window": 5}},
        is_repeated=True,
        ignore=USUAL,
        nest=put_beside(CLIP, "mistral", image="image_token_index"),
    ),
    "kimi_k25": Row(
        variants={"": {**DEEPSEEK, "q_lora_rank": 32, "moe_intermediate_size": 64}},
        sizes=LATENT,
        group_size=32,
        symmetric=True,
        is_repeated=True,
        ignore=KIMI_IGNORE,
        nest=put_beside(KIMI_VISION, "deepseek_v3"),
    ),
}
