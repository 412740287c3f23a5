"""Reading the config.json of a model with latent attention."""

from __future__ import annotations

import dataclasses
import math

import pytest
import transformers

from jaxwna16.errors import ModelError
from jaxwna16.models.families import parse_config
from tests.jaxwna16.models.family_rows import ROWS, SMALL
from tests.jaxwna16.models.family_rows.deepseek import LATENT
from tests.jaxwna16.models.family_rows.deepseek import ROWS as OWN

SIZES = {key: LATENT[key] for key in SMALL if key.endswith(("_size", "_heads", "_layers"))}


def read(model_type="deepseek_v3", **changes):
    return parse_config({"model_type": model_type, **LATENT, **changes})


@pytest.mark.parametrize("model_type", OWN)
def test_absent_keys_take_the_defaults_of_transformers(model_type):
    needed = ROWS[model_type].needed
    saved = transformers.AutoConfig.for_model(model_type, **SIZES, **needed).to_dict()
    sizes = {**SIZES, "max_position_embeddings": saved["max_position_embeddings"]}
    ours = parse_config({"model_type": model_type, **sizes, **needed})
    assert dataclasses.replace(ours, dtype=None, eos_token_ids=()) == dataclasses.replace(
        parse_config(saved), dtype=None, eos_token_ids=()
    )


def test_a_null_is_no_latents_of_queries_and_an_absent_key_is_the_default():
    assert read(q_lora_rank=None).q_lora_rank is None
    config = {key: value for key, value in LATENT.items() if key != "q_lora_rank"}
    assert parse_config({"model_type": "deepseek_v3", **config}).q_lora_rank == 1536


def test_scores_are_scaled_by_the_square_of_what_mscale_all_dim_says():
    yarn = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16}
    plain, scaled = (
        read(rope_scaling={**yarn, **mscales})
        for mscales in ({}, {"mscale": 1.0, "mscale_all_dim": 0.5})
    )
    assert plain.score_scale == 40**-0.5  # 24 features that are not rotated, and 16 that are
    assert scaled.score_scale == pytest.approx(40**-0.5 * (0.05 * math.log(40) + 1) ** 2)


def test_layers_that_predict_are_left_out_as_config_json_says():
    assert read().prediction_layers == 1
    assert read(num_nextn_predict_layers=0).prediction_layers == 0


def test_an_indexer_limits_the_length_and_layers_are_dense_first():
    config = read("deepseek_v32", max_position_embeddings=4096, first_k_dense_replace=1)
    assert config.max_length == config.index_topk == 2048
    assert config.moe.sparse == (False, True)
    assert read("deepseek_v32", max_position_embeddings=64).max_length == 64
    types = {"mlp_layer_types": ["sparse", "dense"]}
    assert read("glm_moe_dsa", **types).moe.sparse == (True, False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim: expected an even number"),
        ({"qk_rope_head_dim": "64"}, "qk_rope_head_dim: expected an integer"),
        ({"kv_lora_rank": 0}, "kv_lora_rank: expected an integer"),
        ({"q_lora_rank": -1}, "q_lora_rank: expected an integer"),
        ({"topk_method": "greedy"}, "topk_method: expected one of noaux_tc"),
        ({"scoring_func": "softmax"}, "scoring_func: expected one of sigmoid"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: expected 1"),
        ({"topk_group": 9}, "topk_group: expected at most n_group"),
        ({"rope_interleave": 1}, "rope_interleave: expected true or false"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_key(changes, reason):
    with pytest.raises(ModelError, match="this deepseek_v3 configuration") as raised:
        read(**changes)
    assert [text[: len(reason)] for text in raised.value.reasons] == [reason]


def test_groups_of_deepseek_v2_count_where_its_method_is_limited_to_them():
    groups = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 2}
    among_all, limited = (
        read("deepseek_v2", topk_method=method, **groups).moe.routing
        for method in ("greedy", "group_limited_greedy")
    )
    assert (among_all.groups, among_all.top_groups) == (1, 1)
    assert (limited.groups, limited.top_groups, limited.group_score) == (4, 2, "max")
    assert not limited.renormalize


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: expected False"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method: expected one of greedy"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "n_group: expected an integer"),
        ("deepseek_v2", {"rope_interleave": False}, "rope_interleave: expected True"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias: expected False"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types: expected 2 entries"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", 1]}, "mlp_layer_types: expected 2"),
    ],
)
def test_what_relatives_do_not_support_is_refused_with_the_key(model_type, changes, reason):
    with pytest.raises(ModelError, match=f"this {model_type} configuration") as raised:
        read(model_type, **{"num_experts_per_tok": 2, **changes})
    assert raised.value.reasons[0].startswith(reason)
