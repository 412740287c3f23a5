"""Reading the config.json of an OLMo 2: what it need not state, and what is refused."""

from __future__ import annotations

import pytest

from jaxwna16.errors import ModelError
from jaxwna16.models.families import parse_config
from tests.jaxwna16.models.family_rows import SMALL


def read(**changes):
    return parse_config({"model_type": "olmo2", **SMALL, **changes})


def test_without_a_number_of_key_heads_there_are_as_many_as_heads():
    stated = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    assert parse_config({"model_type": "olmo2", **stated}).num_key_value_heads == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window": 8}, "sliding_window: expected none"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types: expected full_attention alone"),
        ({"attention_bias": "yes"}, "attention_bias: expected true or false"),
        ({"hidden_size": None}, "hidden_size: expected an integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads: expected a multiple of kv heads = 3"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_key(changes, reason):
    with pytest.raises(ModelError, match="this olmo2 configuration") as raised:
        read(**changes)
    assert [text[: len(reason)] for text in raised.value.reasons] == [reason]
