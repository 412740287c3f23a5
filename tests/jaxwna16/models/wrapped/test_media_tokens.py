"""A prompt with a token that stands for an image is refused wherever tokens come in."""

from __future__ import annotations

import numpy as np
import pytest

from jaxwna16.errors import InputError
from jaxwna16.evaluation.comparison import measure_divergence
from jaxwna16.evaluation.perplexity import measure_perplexity
from jaxwna16.generation.tokens import generate_tokens
from jaxwna16.models.families import parse_config
from jaxwna16.models.wrapped.media_tokens import list_media_faults, refuse_media
from tests.jaxwna16.models.family_rows import SMALL
from tests.jaxwna16.models.hf_models import convert, make_reference

IMAGE = 7
KEYS = {"text_config": SMALL, "image_token_id": IMAGE, "video_token_id": 9}


@pytest.fixture(scope="module")
def model():
    reference = make_reference("qwen3_vl")
    reference.config.image_token_id = IMAGE
    return convert(reference)


def test_generation_says_which_token_of_which_prompt(model):
    with pytest.raises(InputError) as raised:
        generate_tokens(model, [[1, 2], [3, IMAGE, IMAGE]], max_new_tokens=1)
    message = str(raised.value)
    assert f"prompt 1: token {IMAGE} at place 1 and 1 more places" in message
    assert "image_token_id" in message and "text model alone" in message
    assert generate_tokens(model, [[1, 2]], max_new_tokens=1).tokens[0]


def test_scoring_says_so_too(model):
    tokens = np.arange(16)
    with pytest.raises(InputError, match="the text: token 7 at place 7 stands for"):
        measure_perplexity(model, tokens, window=8)
    with pytest.raises(InputError, match="image_token_id"):
        measure_divergence(model, model, tokens, window=8)


def test_every_key_of_a_token_is_read():
    config = parse_config({"model_type": "qwen3_vl", **KEYS})
    assert config.media_tokens == (("image_token_id", IMAGE), ("video_token_id", 9))
    [fault] = list_media_faults(config, {"a": [1, 9], "b": np.array([1, 2])})
    assert fault.startswith("a: token 9 at place 1 stands for") and "video_token_id" in fault
    index = parse_config({"model_type": "mistral3", "text_config": SMALL, "image_token_index": 5})
    assert index.media_tokens == (("image_token_index", 5),)
    silent = parse_config({"model_type": "qwen3_vl", "text_config": SMALL})
    assert dict(silent.media_tokens)["video_token_id"] == 151656


def test_a_model_of_text_alone_refuses_no_token():
    config = parse_config({"model_type": "llama", **SMALL})
    assert not list(list_media_faults(config, {"a": range(200)}))
    refuse_media(object(), {"a": range(200)})
