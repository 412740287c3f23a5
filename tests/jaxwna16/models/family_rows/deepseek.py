"""DeepSeek and its relatives: latent attention."""

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
MSCALES = {"mscale": 0.7, "mscale_all_dim": 1.2}
GROUPS_OF_32 = {"moe_intermediate_size": 64, "q_lora_rank": 32}
SOFTMAX = {key: value for key, value in DEEPSEEK.items() if key != "norm_topk_prob"}
INDEXER = {"index_n_heads": 16, "index_head_dim": 32}

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
                    **MSCALES,
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
    "deepseek_v2": Row(
        needed={"num_experts_per_tok": 2},
        variants={
            "within groups": {
                **SOFTMAX,
                **GROUPS_OF_32,
                "topk_method": "group_limited_greedy",
                **rope("yarn", factor=8.0, original_max_position_embeddings=8, **MSCALES),
            },
            "among all, queries without latents, biases": {
                **SOFTMAX,
                "q_lora_rank": None,
                "attention_bias": True,
                "first_k_dense_replace": 0,
            },
        },
        sizes=LATENT,
        group_size=32,
        is_repeated=True,
        bfloat16={"num_experts_per_tok": 8},
    ),
    "glm4_moe_lite": Row(
        variants={
            "": {**DEEPSEEK, **GROUPS_OF_32, "num_hidden_layers": 3, "v_head_dim": 48},
            "sparse before dense, halves rotated": {
                **DEEPSEEK,
                "mlp_layer_types": ["sparse", "dense"],
                "rope_interleave": False,
            },
        },
        sizes=LATENT,
        group_size=32,
        is_repeated=True,
    ),
    "deepseek_v32": Row(
        variants={"": {**DEEPSEEK, **GROUPS_OF_32, **INDEXER}},
        sizes=LATENT,
        group_size=32,
        is_repeated=True,
    ),
    "glm_moe_dsa": Row(
        variants={"": {**DEEPSEEK, **GROUPS_OF_32, **INDEXER, "index_skip_topk_offset": 1}},
        sizes=LATENT,
        group_size=32,
        is_repeated=True,
    ),
}
