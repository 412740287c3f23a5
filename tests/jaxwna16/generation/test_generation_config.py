"""Settings of generation_config.json that are named, beside what transformers makes of them."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from jaxwna16.generation.generation_config import describe_unapplied

TWO = {"repetition_penalty": 1.05, "no_repeat_ngram_size": 3}
CHANGING = [
    {"repetition_penalty": 1.05},
    {"encoder_repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 3},
    {"encoder_no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5]]},
    {"suppress_tokens": [5]},
    {"begin_suppress_tokens": [5]},
    {"sequence_bias": [[[5], -1.0]]},
    {"forced_bos_token_id": 5},
    {"forced_eos_token_id": 5},
    {"min_length": 300},
    {"min_new_tokens": 4},
    {"exponential_decay_length_penalty": [2, 1.5]},
    {"guidance_scale": 2.0},
    TWO,
]
IDLE = [
    {},
    {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0},
    {"bad_words_ids": None, "guidance_scale": 1, "encoder_repetition_penalty": 1.0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "bos_token_id": 1, "eos_token_id": [2, 3]},
]


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("settings", [*CHANGING, *IDLE], ids=str)
def test_what_transformers_applies_to_greedy_texts_is_named(model, tmp_path, settings):
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    config = transformers.GenerationConfig.from_pretrained(tmp_path)
    config.max_length, config._eos_token_tensor = 20, torch.tensor([2])
    applied = model._get_logits_processor(
        config, input_ids_seq_length=3, encoder_input_ids=torch.ones(1, 3, dtype=torch.long)
    )
    assert bool(applied) == (settings in CHANGING)
    found = "".join(describe_unapplied(tmp_path))
    assert [name for name in settings if name in found] == (list(settings) if applied else [])


def test_the_settings_are_in_one_sentence_with_their_values(tmp_path):
    assert describe_unapplied(tmp_path) == ()
    (tmp_path / "generation_config.json").write_text(json.dumps(TWO))
    (sentence,) = describe_unapplied(tmp_path)
    assert "no_repeat_ngram_size 3, repetition_penalty 1.05 are not applied" in sentence
