"""Where a config.json describes its language model."""

from __future__ import annotations

import pytest
from transformers import Qwen3_5Config

from loaders.schemes.subconfigs import are_tied, find_stated, find_subconfigs


@pytest.mark.parametrize("name", ["text_config", "llm_config", "language_config"])
def test_a_section_is_found_under_each_of_its_names(name):
    config = {name: {"vocab_size": 3, "hidden_size": 4}, "hidden_size": 5, "vision_config": {}}
    assert find_subconfigs(config) == {name: config[name]}
    assert find_stated(config, "vocab_size") == 3
    assert find_stated(config, "hidden_size") == 5
    assert find_stated(config, "num_experts") is None


@pytest.mark.parametrize("part", [None, "text", ["text"]])
def test_what_is_no_object_is_no_section(part):
    assert find_subconfigs({"text_config": part}) == {}


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_of_two_statements_on_tying_the_outer_one_counts_as_in_transformers(outer, inner):
    config = {"tie_word_embeddings": outer, "text_config": {"tie_word_embeddings": inner}}
    assert are_tied(config) is outer is Qwen3_5Config(**config).tie_word_embeddings
    assert are_tied({"text_config": config["text_config"]}) is inner
    assert are_tied({"text_config": {"tie_word_embeddings": None}}) is None
