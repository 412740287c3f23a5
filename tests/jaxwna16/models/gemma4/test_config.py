"""Reading the config.json of a Gemma 4: sizes of layers, ropes, shared keys; what is refused."""

from __future__ import annotations

import pytest

from jaxwna16.errors import ModelError
from jaxwna16.models.families import parse_config
from jaxwna16.models.filling.skipped import find_skipped, list_rules
from tests.jaxwna16.models.family_rows import SMALL
from tests.jaxwna16.models.family_rows.gemma import BESIDE, DENSE, SHARED


def read(**changes):
    return parse_config({"model_type": "gemma4_text", **SMALL, **changes})


def test_sizes_of_layers_are_read_from_either_form():
    stated = read(**DENSE)
    assert (stated.head_dim, stated.global_head_dim, stated.kv_heads) == (16, 32, (2, 1))
    assert [stated.find_head_dim(i) for i in range(2)] == [16, 32]
    sizes = {"1": {"head_dim": 32, "num_key_value_heads": 1}}
    facts = {key: value for key, value in DENSE.items() if "global" not in key}
    assert read(**facts, per_layer_config=sizes) == stated
    assert read(**DENSE, per_layer_config=sizes) == stated


def test_fewer_keys_in_layers_that_see_all_tokens_are_of_keys_that_are_values_alone():
    assert read(**DENSE | {"attention_k_eq_v": False}).kv_heads == (2, 2)


def test_the_rope_of_layers_that_see_all_tokens_spans_their_heads():
    config = read(**DENSE)
    facts = config.global_rope.rope_type, config.global_rope.proportion, config.global_rope.span
    assert facts == ("proportional", 0.25, 32)
    assert (config.global_rope.theta, config.rope.theta, config.rotary_dim) == (1e6, 1e4, 16)


def test_the_last_layer_sees_all_tokens():
    assert read(num_hidden_layers=8, sliding_window=7).windows == (7, 7, 7, 7, 7, None, 7, None)


def test_layers_that_share_take_the_last_keys_of_their_kind_and_have_wide_mlps():
    config = read(**SHARED)
    assert config.sources == (None, None, 0, 1, 1)
    assert config.inner == (96, 96, 192, 192, 192)
    assert read(**SHARED | {"use_double_wide_mlp": False}).inner == (96,) * 5


def test_keys_of_layers_that_share_are_left_out_and_no_others():
    read_ones = [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]
    kept = [*read_ones, "model.layers.3.self_attn.q_proj", "model.layers.12.self_attn.k_proj"]
    parts = ("k_proj", "v_proj", "k_norm.weight", "v_norm")
    left = [f"model.language_model.layers.2.self_attn.{part}" for part in parts]
    assert list(find_skipped(list_rules(read(**SHARED)), [*kept, *left])) == left


def test_experts_beside_the_mlp_have_the_familys_keys():
    moe = read(**BESIDE).moe
    assert moe is not None
    assert (moe.experts, moe.intermediate_size, moe.routing.top_k) == (4, 32, 2)
    assert read(**BESIDE | {"enable_moe_block": False}).moe is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"per_layer_config": {"2": {}}}, "per_layer_config: expected sizes of layers"),
        ({"per_layer_config": {"1": {"rope": 1}}}, "per_layer_config.1: expected head_dim and"),
        ({"per_layer_config": {"1": {"head_dim": 0}}}, "per_layer_config.1.head_dim: expected"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config: expected head_dim = 16"),
        ({"per_layer_config": {"1": {"head_dim": 64}}}, "global_head_dim: expected what per_layer"),
        ({"num_global_key_value_heads": 3}, "num_attention_heads: expected a multiple of kv heads"),
        ({"global_head_dim": 33}, "global_head_dim: expected an even number"),
        ({"rope_theta": 1e5}, "rope_theta: expected nothing"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters: expected one set of"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
            "full_attention: rope_type: expected default or linear or proportional",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor: expected 1.0",
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 2.0}
                }
            },
            "partial_rotary_factor: expected a number above 0 and at most 1",
        ),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types: expected full_attention in the"),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers: expected fewer of the 2 layers"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers: expected fewer of the 2 layers"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention: expected none"),
        ({"enable_moe_block": True}, "num_experts: expected an integer"),
        (BESIDE | {"top_k_experts": 5}, "top_k_experts: expected at most 4"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: expected none in this family"),
        ({"sliding_window": None}, "sliding_window: expected an integer of at least 1"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(changes, reason):
    with pytest.raises(ModelError) as caught:
        read(**DENSE | changes)
    assert any(reason in line for line in caught.value.reasons), caught.value.reasons


@pytest.mark.parametrize("key", ["hidden_size_per_layer_input", "enable_moe_block"])
def test_a_unified_model_has_neither_experts_nor_embeddings_of_each_layer(key):
    with pytest.raises(ModelError, match=key):
        parse_config({"model_type": "gemma4_unified_text", **SMALL, key: True})
