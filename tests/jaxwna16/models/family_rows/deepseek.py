"""DeepSeek and Kimi K2: latent attention."""

from __future__ import annotations

from tests.jaxwna16.models.family_rows.llama import DEEPSEEK
from tests.jaxwna16.models.family_rows.row import SMALL, Row, rope

LATENT = {
    **SMALL,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}

ROWS: dict[str, Row] = {
    "deepseek_v3": Row(
        variants={
            "": {
                **DEEPSEEK,
                "rms_norm_eps": 1e-2,  # which latents do not have
                **rope(
                    "yarn",
                    factor=40.0,
                    original_max_position_embeddings=8,
                    mscale=0.7,
                    mscale_all_dim=1.2,
                ),
            },
            "queries without latents, biases, halves rotated, plain rope": {
                **DEEPSEEK,
                "q_lora_rank": None,
                "attention_bias": True,
                "rope_interleave": False,
                "norm_topk_prob": False,
                "n_group": 1,
                "topk_group": 1,
                "v_head_dim": 32,
            },
        },
        sizes=LATENT,
        bfloat16={"num_experts_per_tok": 8},
    ),
}
