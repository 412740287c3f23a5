"""`config.json` in all its spellings, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxwna16.errors import ModelError
from jaxwna16.models.llama.config import LlamaConfig
from jaxwna16.models.llama.relatives import RELATIVES, Relative
from jaxwna16.models.parts.rope import attention_factor, inverse_frequencies
from tests.jaxwna16.models.hf_models import FAMILIES, SMALL, make_reference

LLAMA = {"model_type": "llama", **SMALL}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


def parse(**changes) -> LlamaConfig:
    return LlamaConfig.from_dict({**LLAMA, **changes})


def test_the_old_spelling_means_the_same_as_the_new_one():
    old = parse(rope_theta=5e5, rope_scaling={"type": "yarn", **YARN}, torch_dtype="bfloat16")
    new = parse(rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **YARN}, dtype="bfloat16")
    assert old == new
    assert new.rope.theta == 5e5
    assert new.dtype == "bfloat16"


def test_absent_keys_take_the_defaults_of_transformers():
    config = parse(num_key_value_heads=None, rope_scaling=None)
    assert config.num_key_value_heads == 4
    assert config.head_dim == 16
    assert config.rope.rope_type == "default"
    assert config.rope.theta == 10000.0
    assert not config.tie_word_embeddings
    assert parse(model_type="qwen3").head_dim == 128
    assert parse(model_type="mistral").windows == (4096, 4096)
    assert parse(model_type="mistral", sliding_window=None).windows == (None, None)


def test_windows_follow_the_rules_of_each_family():
    window = {"sliding_window": 8, "max_window_layers": 1}
    assert parse(**window).windows == (None, None)
    assert parse(model_type="mistral", sliding_window=8).windows == (8, 8)
    assert parse(model_type="qwen2", **window).windows == (None, None)
    assert parse(model_type="qwen2", use_sliding_window=True, **window).windows == (None, 8)
    off = {**window, "sliding_window": None}
    assert parse(model_type="qwen2", use_sliding_window=True, **off).windows == (None, None)
    types = ["sliding_attention", "full_attention"]
    explicit = parse(model_type="qwen3", use_sliding_window=True, layer_types=types, **window)
    assert explicit.windows == (8, None)


@pytest.fixture
def planted(monkeypatch) -> str:
    """A relative whose row says nothing."""
    monkeypatch.setitem(RELATIVES, "planted", Relative())
    return "planted"


def test_a_relative_whose_row_says_nothing_has_no_windows_and_no_experts(planted):
    """It once had those of Qwen2: a window of 4,096 from layer 28 on."""
    off = {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1}
    for changes in ({}, off, {"sliding_window": None}, {"layer_types": ["full_attention"] * 30}):
        config = parse(model_type=planted, num_hidden_layers=30, **changes)
        assert config.windows == (None,) * 30
    plain = parse(model_type=planted)
    assert plain.moe is None
    assert not (plain.qkv_bias or plain.out_bias or plain.mlp_bias or plain.qk_norm)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 8},
        {"use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": "sliding_attention"},
    ],
)
def test_windows_that_the_row_does_not_state_are_refused(planted, changes):
    [key] = changes
    with pytest.raises(ModelError) as raised:
        parse(model_type=planted, **changes)
    [reason] = raised.value.reasons
    assert reason.startswith(f"{key}: expected ")
    assert "models of this family have no windows" in reason


def test_biases_and_norms_follow_the_family():
    keys = {"attention_bias": True, "mlp_bias": True}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    facts = {
        model_type: (config.qkv_bias, config.out_bias, config.mlp_bias, config.qk_norm)
        for model_type in RELATIVES
        # the text model of GLM-4.5V has no such norms, whatever is said
        for own in [{"use_qk_norm": model_type != "glm4v_moe_text"}]
        # and what a family cannot have is not asked for
        for asked in [{**keys, **own, **experts, **RELATIVES[model_type].required}]
        for config in [parse(model_type=model_type, **asked)]
    }
    assert facts == {
        "llama": (True, True, True, False),
        "mistral": (False, False, False, False),
        "qwen2": (True, False, False, False),
        "qwen3": (True, True, False, True),
        "smollm3": (True, True, True, False),
        "seed_oss": (True, False, True, False),
        "phi3": (False, False, False, False),
        "mixtral": (False, False, False, False),
        "qwen2_moe": (True, False, False, False),
        "qwen3_moe": (True, True, False, True),
        "ernie4_5": (False, False, False, False),
        "ernie4_5_moe": (False, False, False, False),
        "hunyuan_v1_dense": (True, True, False, True),
        "hunyuan_v1_moe": (True, True, False, True),
        "olmoe": (True, True, False, True),
        "dots1": (True, True, False, True),
        "glm4_moe": (True, False, False, True),
        "minimax_m2": (False, False, False, True),
        "granite": (True, True, True, False),
        "granitemoe": (True, True, False, False),
        "ministral3": (False, False, False, False),
        "qwen2_vl_text": (True, False, False, False),
        "qwen2_5_vl_text": (True, False, False, False),
        "qwen3_vl_text": (True, True, False, True),
        "qwen3_vl_moe_text": (True, True, False, True),
        "qwen2_5_omni_text": (True, False, False, False),
        "qwen3_omni_moe_text": (True, True, False, True),
        "glm4v_moe_text": (True, False, False, False),
    }


def test_end_tokens_are_none_one_or_several():
    assert parse(eos_token_id=None).eos_token_ids == ()
    assert parse(eos_token_id=2).eos_token_ids == (2,)
    assert parse(eos_token_id=[2, 7]).eos_token_ids == (2, 7)


def test_rope_stretches_the_length():
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    lengths = [
        parse(rope_scaling=scaling).max_length
        for scaling in (
            None,
            {"type": "dynamic", "factor": 2.0},
            {"type": "linear", "factor": 2.0},
            {"type": "yarn", **YARN},  # 128 is what 32 is stretched to
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            {"type": "llama3", "original_max_position_embeddings": 16, **llama3},
        )
    ]
    assert lengths == [128, 256, 256, 128, 512, 128]


def test_both_spellings_of_rope_may_say_the_same():
    new = {"rope_type": "yarn", "rope_theta": 5e5, **YARN}
    alone, both = (
        parse(rope_parameters=new, **more)
        for more in ({}, {"rope_scaling": {"type": "yarn", **YARN}})
    )
    assert alone == both


def test_yarn_that_is_told_null_does_not_truncate():
    """As in transformers, where null is falsy and absent is true."""
    for truncate, expected in ((None, False), (False, False), (True, True)):
        assert parse(rope_scaling={"type": "yarn", "truncate": truncate, **YARN}).rope.truncate is (
            expected
        )
    assert parse(rope_scaling={"type": "yarn", **YARN}).rope.truncate


def test_a_configuration_is_hashable():
    assert hash(parse()) == hash(parse())


FACTORS = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}


def parse_phi3(rope_type: str = "longrope", **changes) -> LlamaConfig:
    scaling = {"type": rope_type, **FACTORS, **changes.pop("scaling", {})}
    facts = {"model_type": "phi3", "partial_rotary_factor": 0.75, "rope_scaling": scaling}
    return parse(**{**facts, **changes})


def test_longrope_has_the_names_and_the_length_that_published_files_give_it():
    """The length stands beside the factors, and is 4096 where it is absent, as in transformers."""
    config = parse_phi3(original_max_position_embeddings=32)
    assert config.rotary_dim == 12
    assert config.rope.original_max_positions == 32
    assert config.rope.factor == 4.0
    assert config.rope.long_factors == (2.0,) * 6
    assert config.max_length == 128
    for name in ("su", "yarn"):
        assert parse_phi3(name, original_max_position_embeddings=32) == config
    assert parse_phi3(scaling={"original_max_position_embeddings": 8}).rope == parse_phi3().rope
    assert parse_phi3().rope.original_max_positions == 4096
    assert attention_factor(parse_phi3().rope) == 1.0  # no longer than it was


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"rope_type": "linear"}, "rope_scaling.rope_type: expected one of default, longrope"),
        ({"scaling": {"short_factor": [1.0]}}, "rope_scaling.short_factor: expected 6 positive"),
        ({"scaling": {"long_factor": [0.0] * 6}}, "rope_scaling.long_factor: expected 6 positive"),
        ({"scaling": {"long_factor": None}}, "rope_scaling.long_factor: expected 6 positive"),
        ({"original_max_position_embeddings": 1}, "original_max_position_embeddings: expected"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor: expected an even part"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types: expected none"),
    ],
)
def test_a_longrope_that_cannot_be_served_is_refused_by_name(facts, reason):
    with pytest.raises(ModelError) as raised:
        parse_phi3(**facts)
    assert raised.value.reasons[0].startswith(reason)


def test_other_families_have_no_longrope():
    with pytest.raises(ModelError, match="rope_type: expected one of default, linear"):
        parse(rope_scaling={"type": "longrope", **FACTORS})


@pytest.mark.parametrize("family", [f for f in FAMILIES if "dynamic" not in f])
def test_frequencies_equal_those_of_transformers_to_the_last_bits(family):
    reference = make_reference(family)
    config = LlamaConfig.from_dict(reference.config.to_dict())
    rotary = reference.model.rotary_emb
    ours = inverse_frequencies(config.rope, config.rotary_dim)
    assert ours.dtype == np.float32
    np.testing.assert_array_max_ulp(ours, rotary.inv_freq.numpy(), maxulp=2)
    assert attention_factor(config.rope) == pytest.approx(rotary.attention_scaling, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mamba"}, "model_type: expected one of llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type: expected one of llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act: expected one of silu, swish, found 'gelu'"),
        ({"hidden_size": None}, "hidden_size: expected an integer of at least 1, found None"),
        ({"vocab_size": 12.5}, "vocab_size: expected an integer of at least 1, found 12.5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected an integer of at least 1, found 0"),
        ({"hidden_size": 66}, "hidden_size: expected a multiple of num_attention_heads = 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads: expected a multiple of kv heads = 3"),
        ({"head_dim": 15}, "head_dim: expected an even number, found 15"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: expected a positive number"),
        ({"torch_dtype": "int8"}, "torch_dtype: expected one of float32, bfloat16, float16"),
        ({"eos_token_id": "end"}, "eos_token_id: expected a token or a list of tokens"),
        ({"is_causal": False}, "is_causal: expected only causal attention, found False"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type: expected one of default"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: expected a positive number"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
        ({"rope_parameters": {"full_attention": {}}}, "one flat set of parameters"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn", **YARN}},
            "rope_scaling: expected the same as rope_parameters",
        ),
        ({"rope_theta": 1.0}, "\n  - rope_theta: expected a number above 1, found 1.0"),
        ({"rope_scaling": {"type": "yarn", "truncate": "no", **YARN}}, "rope_scaling.truncate"),
        ({"per_layer_config": {"1": {"sliding_window": 5}}}, "per_layer_config: expected none"),
        ({"rope_theta": "big"}, "rope_theta: expected a number above 1, found 'big'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, found 0.5"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 2}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "expected 2 entries"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "is off"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_scaling.rope_type: expected one of"),
        (
            {"rope_scaling": {"type": "yarn", "llama_4_scaling_beta": 0.1, **YARN}},
            "rope_scaling.llama_4_scaling_beta: expected nothing: no part of a llama model reads",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 1]}},
            "rope_parameters.mrope_section: expected nothing: no part of a llama model reads it",
        ),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "rope_parameters.factor"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected one flat set of parameters"),
        ({"model_type": "qwen2", "layer_types": 2}, "layer_types: expected 2 entries"),
        ({"model_type": "qwen2", "max_window_layers": "x"}, "max_window_layers: expected an int"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window: expected an integer"),
        (
            {"model_type": "hunyuan_v1_dense", "rope_scaling": {"type": "dynamic", "alpha": "1"}},
            "rope_scaling.alpha: expected a number from 1 to",
        ),
        ({"model_type": "hunyuan_v1_moe", "use_cla": True}, "use_cla: expected False in every"),
        ({"model_type": "hunyuan_v1_moe", "moe_topk": [1, 2]}, "moe_topk: expected an integer of"),
        (
            {"model_type": "hunyuan_v1_moe", "moe_intermediate_size": [96, 8]},
            "expected 96 in every",
        ),
        ({"model_type": "hunyuan_v1_moe", "num_shared_expert": [2, 2]}, "num_shared_expert"),
        ({"model_type": "ernie4_5_moe", "use_bias": True}, "use_bias: expected False in every"),
        ({"model_type": "ernie4_5_moe", "moe_norm_min": 0.1}, "moe_norm_min: expected at most 1e-"),
        ({"model_type": "ernie4_5_moe", "moe_k": 65}, "moe_k: expected at most 64"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers: expected at least 2"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "1 for a layer with rope or 0"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_key_and_the_choices(changes, reason):
    with pytest.raises(ModelError) as raised:
        parse(**changes)
    assert reason in str(raised.value)


def test_a_fault_is_not_listed_again_as_what_follows_from_it():
    with pytest.raises(ModelError) as raised:
        parse(hidden_size="64")
    assert len(raised.value.reasons) == 1


def test_every_reason_is_listed_at_once():
    with pytest.raises(ModelError) as raised:
        parse(hidden_act="gelu", vocab_size=None, rope_scaling={"type": "su"})
    assert len(raised.value.reasons) == 3


def test_a_configuration_stays_as_it_is():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse().vocab_size = 3  # type: ignore[misc]
