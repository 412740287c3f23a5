"""Reading the config.json of a Gemma: what a null and an absent key mean, and what is refused."""

from __future__ import annotations

import pytest

from jaxwna16.errors import ModelError
from jaxwna16.models.families import parse_config
from tests.jaxwna16.models.family_rows import SMALL


def read(**changes):
    return parse_config({"model_type": "gemma2", **SMALL, **changes})


def test_a_null_softcap_is_none_and_an_absent_one_is_the_default():
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    default, off = read(), read(**caps)
    assert (default.attention_softcap, default.final_softcap) == (50.0, 30.0)
    assert (off.attention_softcap, off.final_softcap) == (None, None)


def test_the_first_layer_slides_and_every_other_after_it():
    assert read(num_hidden_layers=5, sliding_window=7).windows == (7, None, 7, None, 7)


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
