"""Reading the config.json of a Command R or a successor: what is absent, what is refused."""

from __future__ import annotations

import pytest

from jaxwna16.errors import ModelError
from jaxwna16.models.cohere.config import CohereConfig
from jaxwna16.models.families import parse_config
from tests.jaxwna16.models.family_rows import SMALL

PUBLISHED = {
    "layer_switch": 4,
    "logit_scale": 0.25,
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "sliding_window": 8,
    "sliding_window_pattern": 4,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_qk_norm": False,
}
"""Keys of Command R7B."""


def read(model_type: str = "cohere2", **changes) -> CohereConfig:
    parsed = parse_config({"model_type": model_type, **SMALL, **changes})
    assert isinstance(parsed, CohereConfig)
    return parsed


def test_layers_with_a_window_have_rope_and_every_fourth_has_neither():
    found = read(num_hidden_layers=4, **PUBLISHED)
    assert found.windows == (8, 8, 8, None)
    assert found.rotated == (True, True, True, False)
    assert (found.logit_scale, found.tie_word_embeddings) == (0.25, True)


def test_a_command_r_has_rope_and_no_window_in_all_layers():
    found = read("cohere", sliding_window=8)
    assert (found.windows, found.rotated) == ((None, None), (True, True))
    assert (found.logit_scale, found.rope.theta) == (0.0625, 5e5)


def test_the_eps_of_norms_has_a_key_of_its_own():
    assert read(layer_norm_eps=1e-3, rms_norm_eps=1e-6).rms_norm_eps == 1e-3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_qk_norm": True}, "use_qk_norm: expected false, found True"),
        ({"use_parallel_block": False}, "use_parallel_block: expected true, found False"),
        ({"use_gated_activation": False}, "use_gated_activation: expected true, found False"),
        ({"rotary_pct": 0.5}, "rotary_pct: expected 1.0, found 0.5"),
        ({"sliding_window": None}, "sliding_window: expected an integer"),
        ({"logit_scale": 0}, "logit_scale: expected a positive number"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps: expected a positive number"),
        ({"attention_bias": 1}, "attention_bias: expected true or false"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_key(changes, reason):
    with pytest.raises(ModelError, match="this cohere2 configuration") as raised:
        read(**changes)
    assert [text[: len(reason)] for text in raised.value.reasons] == [reason]
