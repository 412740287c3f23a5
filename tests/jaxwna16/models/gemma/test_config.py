"""Reading the config.json of a Gemma: what a null and an absent key mean, and what is refused."""

from __future__ import annotations

import pytest

from jaxwna16.errors import ModelError
from jaxwna16.models.families import parse_config
from tests.jaxwna16.models.family_rows import SMALL


def read(model_type="gemma2", **changes):
    return parse_config({"model_type": model_type, **SMALL, **changes})


def test_a_null_softcap_is_none_and_an_absent_one_is_the_default():
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    default, off = read(), read(**caps)
    assert (default.attention_softcap, default.final_softcap) == (50.0, 30.0)
    assert (off.attention_softcap, off.final_softcap) == (None, None)


def test_the_first_layer_slides_and_every_other_after_it():
    assert read(num_hidden_layers=5, sliding_window=7).windows == (7, None, 7, None, 7)


def test_layers_of_gemma_3_have_the_rope_of_their_kind_in_the_new_and_the_old_keys():
    old = read("gemma3_text", rope_theta=2e6, rope_scaling={"rope_type": "linear", "factor": 8.0})
    parts = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert old == read("gemma3_text", rope_parameters=parts)
    assert (old.rope.theta, old.rope.factor) == (2e6, 8.0)
    assert old.local_rope is not None
    assert (old.local_rope.theta, old.local_rope.rope_type) == (1e4, "default")
    assert old.max_length == SMALL["max_position_embeddings"]


def test_five_of_six_layers_of_gemma_3_slide():
    windows = read("gemma3_text", num_hidden_layers=8, sliding_window=7).windows
    assert windows == (7, 7, 7, 7, 7, None, 7, 7)
    assert read("gemma3_text", sliding_window_pattern=1).windows == (None, None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters: expected one set of"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling: expected a rope_type"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "su"}}},
            "sliding_attention: rope_parameters.rope_type: expected one of",
        ),
        ({"rope_local_base_freq": -1.0}, "sliding_attention: rope_theta: expected a number"),
        ({"attn_logit_softcapping": 3.0}, "attn_logit_softcapping: expected none in this family"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern: expected an integer"),
        ({"sliding_window": None}, "sliding_window: expected an integer of at least 1"),
    ],
)
def test_what_gemma_3_does_not_support_is_refused_with_the_key(changes, reason):
    with pytest.raises(ModelError, match="this gemma3_text configuration") as raised:
        read("gemma3_text", **changes)
    assert [text[: len(reason)] for text in raised.value.reasons] == [reason]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation: expected one of gelu_pytorch_tanh"),
        (
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention: expected only",
        ),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: expected a positive number"),
        ({"attn_logit_softcapping": -3.0}, "attn_logit_softcapping: expected a positive number"),
        ({"final_logit_softcapping": "no"}, "final_logit_softcapping: expected a positive number"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected 2 entries"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_key(changes, reason):
    with pytest.raises(ModelError, match="this gemma2 configuration") as raised:
        read(**changes)
    assert [text[: len(reason)] for text in raised.value.reasons] == [reason]
