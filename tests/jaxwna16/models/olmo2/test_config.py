"""Reading the config.json of an OLMo 2 and its relatives: what is absent, what is refused."""

from __future__ import annotations

import pytest

from jaxwna16.errors import ModelError
from jaxwna16.models.families import parse_config
from jaxwna16.models.olmo2.config import Olmo2Config
from tests.jaxwna16.models.family_rows import SMALL

SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def read(model_type: str = "olmo2", **changes) -> Olmo2Config:
    parsed = parse_config({"model_type": model_type, **SMALL, **changes})
    assert isinstance(parsed, Olmo2Config)
    return parsed


def test_without_a_number_of_key_heads_there_are_as_many_as_heads():
    stated = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    assert parse_config({"model_type": "olmo2", **stated}).num_key_value_heads == 4


def test_an_olmo3_scales_layers_that_see_all_tokens_and_no_others():
    old = read("olmo3", num_hidden_layers=4, rope_theta=5e5, rope_scaling=YARN)
    assert old.windows == (4096, 4096, 4096, None)
    assert old.rotations == (1, 1, 1, 0)
    assert [rope.rope_type for rope in old.ropes] == ["yarn", "default"]
    assert [rope.theta for rope in old.ropes] == [5e5, 5e5]
    assert old.max_length == 128
    parts = {FULL: {"rope_theta": 5e5, **YARN}, SLIDING: {"rope_type": "default"}}
    assert read("olmo3", num_hidden_layers=4, rope_parameters=parts) == old


def test_an_olmo3_whose_sliding_layers_have_a_base_of_their_own():
    parts = {FULL: {"rope_theta": 1e6}, SLIDING: {"rope_theta": 1e3}}
    assert [rope.theta for rope in read("olmo3", rope_parameters=parts).ropes] == [1e6, 1e3]
    dynamic = {SLIDING: {"rope_type": "dynamic", "factor": 2.0}}
    assert read("olmo3", rope_parameters=dynamic).whole_prompts


def test_an_exaone4_has_rope_in_sliding_layers_or_in_all():
    def list_layers(**changes):
        parsed = read("exaone4", num_hidden_layers=4, **changes)
        return parsed.windows, parsed.rotations

    hybrid = (4096, 4096, 4096, None), (0, 0, 0, None)
    assert list_layers() == list_layers(sliding_window_pattern="LLLG") == hybrid
    assert list_layers(sliding_window_pattern=2, sliding_window=8) == (
        (8, None, 8, None),
        (0, None, 0, None),
    )
    without = {"sliding_window": None, "sliding_window_pattern": "LLLG"}
    assert list_layers(**without) == ((None,) * 4, (0,) * 4)
    assert list_layers(layer_types=[FULL] * 4) == ((None,) * 4, (None,) * 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window": 8}, "sliding_window: expected none"),
        ({"layer_types": [SLIDING] * 2}, "layer_types: expected full_attention alone"),
        ({"attention_bias": "yes"}, "attention_bias: expected true or false"),
        ({"hidden_size": None}, "hidden_size: expected an integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads: expected a multiple of kv heads = 3"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_key(changes, reason):
    assert_refused("olmo2", changes, reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: expected a rope_type"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "x"}}, "rope_parameters.factor"),
        ({"rope_scaling": "yarn"}, "rope_parameters: expected one flat set"),
        ({"rope_parameters": YARN}, "rope_parameters: expected one set of parameters for full"),
        ({"rope_parameters": "yarn"}, "rope_parameters: expected one set of parameters for full"),
        ({"rope_parameters": {FULL: {}}, "rope_scaling": YARN}, "rope_scaling: expected nothing"),
        (
            {"rope_parameters": {SLIDING: {"rope_theta": 1}}},
            "sliding_attention: rope_parameters.rope_theta: expected a number above 1",
        ),
        (
            {"rope_parameters": {SLIDING: {"partial_rotary_factor": 0.5}}},
            "sliding_attention: partial_rotary_factor: expected 1.0",
        ),
        ({"rope_parameters": {SLIDING: 3}}, "sliding_attention: rope_parameters: expected one"),
        ({"rope_theta": 1e4}, "rope_theta: expected 500000, or rope_parameters with a rope_theta"),
        ({"sliding_window": None}, "sliding_window: expected an integer"),
    ],
)
def test_what_readers_of_an_olmo3_do_not_agree_on_is_refused(changes, reason):
    assert_refused("olmo3", changes, reason)


@pytest.mark.parametrize("pattern", ["LLLG", "LG L", "GL", "", 0, [4]])
def test_a_pattern_that_does_not_divide_an_exaone4_is_refused(pattern):
    assert_refused(
        "exaone4", {"sliding_window_pattern": pattern}, "sliding_window_pattern: expected a"
    )


def assert_refused(model_type: str, changes: dict, reason: str) -> None:
    with pytest.raises(ModelError, match=f"this {model_type} configuration") as raised:
        read(model_type, **changes)
    assert [text[: len(reason)] for text in raised.value.reasons] == [reason]
