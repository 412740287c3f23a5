"""`config.json` of models with experts: defaults of transformers, and what is refused."""

from __future__ import annotations

import pytest

from jaxwna16.errors import ModelError
from jaxwna16.models.llama.config import LlamaConfig
from tests.jaxwna16.models.hf_models import SMALL, SPARSE, make_reference

NEEDED = {
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
}
"""What transformers' configuration has no default for."""


def parse(model_type: str = "qwen3_moe", **changes) -> LlamaConfig:
    needed = NEEDED.get(model_type, {})
    return LlamaConfig.from_dict({"model_type": model_type, **SMALL, **needed, **changes})


def read(model_type: str = "qwen3_moe", **changes):
    moe = parse(model_type, **changes).moe
    assert moe is not None
    return moe


@pytest.mark.parametrize("family", SPARSE)
def test_which_layers_are_sparse_is_what_transformers_builds(family):
    reference = make_reference(family)
    theirs = tuple(
        hasattr(layer, "block_sparse_moe") or hasattr(layer.mlp, "experts")
        for layer in reference.model.layers
    )
    moe = LlamaConfig.from_dict(reference.config.to_dict()).moe
    assert moe is not None
    assert moe.sparse == theirs
    assert any(theirs)


def test_models_without_experts_have_none():
    assert parse("qwen3").moe is None


def test_the_number_of_experts_has_an_old_and_a_new_name():
    assert read(num_experts=16) == read(num_local_experts=16)
    assert read("dots1", n_routed_experts=None, num_local_experts=8) == read("dots1")


def test_mixtral_always_renormalises():
    moe = read("mixtral", norm_topk_prob=False)
    assert moe.routing.renormalize
    assert moe.intermediate_size == SMALL["intermediate_size"]


def test_shared_experts_of_deepseek_are_one_mlp():
    moe = read("dots1", n_shared_experts=3, moe_intermediate_size=32)
    assert (moe.shared, moe.shared_intermediate_size) == ("shared_experts", 96)


def test_the_name_of_dots_method_is_taken_for_its_scores():
    assert read("dots1", scoring_func="noaux_tc") == read("dots1", scoring_func="sigmoid")


def test_glm_rotates_half_of_each_head_unless_it_says_otherwise():
    assert parse("glm4_moe", head_dim=32).rotary_dim == 16
    assert parse("glm4_moe", head_dim=32, partial_rotary_factor=0.25).rotary_dim == 8
    given = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    assert parse("glm4_moe", head_dim=32, rope_parameters=given).rotary_dim == 32


def test_windows_follow_the_rules_of_each_family():
    window = {"sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 3}
    on = {"use_sliding_window": True, **window}
    assert parse("mixtral").windows == (None, None)
    assert parse("mixtral", **window).windows == (8, 8, 8)
    assert parse("qwen2_moe", **window).windows == (None, None, None)
    assert parse("qwen2_moe", **on).windows == (8, None, None)
    assert parse("qwen3_moe", **window).windows == (None, None, None)
    assert parse("qwen3_moe", **on).windows == (8, 8, 8)
    assert parse("dots1", **window).windows == (None, 8, 8)
    assert parse("dots1", **(window | {"sliding_window": None})).windows == (None, None, None)
    assert parse("glm4_moe", **on).windows == (None, None, None)


GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act: expected one of silu, swish"),
        ("mixtral", {"scoring_func": "sigmoid"}, "scoring_func: expected one of softmax, found"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts: expected an integer of at"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok: expected at most 8"),
        (
            "mixtral",
            {"num_experts": 4, "num_local_experts": 8},
            "num_experts: expected the same as",
        ),
        ("qwen3_moe", {"num_experts": "many"}, "num_experts: expected an integer"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob: expected true or false, found 1"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: expected an integer"),
        ("qwen3_moe", {"mlp_only_layers": [0.5]}, "mlp_only_layers: expected a list of layers"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers: expected a list of layers"),
        ("qwen3_moe", {"moe_intermediate_size": -1}, "moe_intermediate_size: expected an integer"),
        ("qwen3_moe", {"topk_method": "noaux_tc"}, "topk_method: expected one of greedy, found"),
        ("qwen3_moe", {"layer_types": ["full_attention"] * 2}, "none in a qwen3_moe model"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ("qwen2_moe", {"qkv_bias": "yes"}, "qkv_bias: expected true or false"),
        ("dots1", {"scoring_func": "softmax"}, "scoring_func: expected one of sigmoid, noaux_tc"),
        ("dots1", {"topk_method": "greedy"}, "topk_method: expected one of noaux_tc, found"),
        ("dots1", {"n_routed_experts": None}, "n_routed_experts: expected an integer"),
        ("dots1", {"n_shared_experts": None}, "n_shared_experts: expected an integer"),
        ("dots1", {"n_shared_experts": 0}, "n_shared_experts: expected an integer of at least 1"),
        ("dots1", {"moe_layer_freq": 2}, "moe_layer_freq: expected 1 in every layer, found 2"),
        ("dots1", {"first_k_dense_replace": -1}, "first_k_dense_replace: expected an integer"),
        ("dots1", {"routed_scaling_factor": 0}, "routed_scaling_factor: expected a positive"),
        ("dots1", {**GROUPS, "n_group": 3}, "n_group: expected a divisor of the 16 experts"),
        ("dots1", {**GROUPS, "n_group": 16}, "n_group: expected groups of at least 2 experts"),
        ("dots1", {**GROUPS, "topk_group": 5}, "topk_group: expected at most n_group = 4"),
        ("dots1", {**GROUPS, "num_experts_per_tok": 9}, "num_experts_per_tok: expected at most 8"),
        (
            "dots1",
            {"sliding_window": None, "layer_types": ["sliding_attention"] * 2},
            "layer_types",
        ),
        ("glm4_moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected an even"),
        ("glm4_moe", {"partial_rotary_factor": 0.2}, "an even part of head_dim = 16, found 0.2"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: expected nothing, found 8.0"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_key_and_the_choices(model_type, changes, reason):
    with pytest.raises(ModelError) as raised:
        parse(model_type, **changes)
    assert reason in str(raised.value)
    assert len(raised.value.reasons) == 1


def test_a_configuration_is_hashable():
    assert hash(parse("dots1")) == hash(parse("dots1"))
