"""Texts that end before a stop string: by definition, against transformers, and as they stream."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from jaxwna16 import InputError, Tokenizer, generate, load_model
from jaxwna16.generation.streaming.stop_strings import StoppingText
from tests.jaxwna16.cli.checkpoints import END, write_float_checkpoint

PROMPTS = ["A dark night", "Once", "It was the best of times"]
NEW = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stop") / "tiny"
    write_float_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    """A token is a byte, so that every stop string straddles tokens."""
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def cut(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, by trying every beginning."""
    for end in range(len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    text=st.text("ab"),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 40)),
)
def test_a_text_ends_before_the_stop_string_that_is_complete_first(tokenizer, text, stop, cuts):
    ids = tokenizer.encode(text)
    row = StoppingText(tokenizer, stop)
    ends = sorted({min(c, len(ids)) for c in cuts} | {0, len(ids)})
    pieces = [row.push(ids[a:b]) for a, b in itertools.pairwise(ends)]
    expected, stopped = cut(text, stop)
    if not stopped:  # no more is held back than must be: what can begin a stop string
        joined = "".join(pieces)
        beginnings = {s[:n] for s in stop for n in range(1, len(s))}
        assert text[len(joined) :] == max(
            (b for b in beginnings if text.endswith(b)), key=len, default=""
        )
    pieces.append(row.flush())
    assert "".join(pieces) == row.text == expected
    assert row.stopped == stopped
    if stopped:
        assert row.push(ids) == row.flush() == ""
        assert cut(text[: row.tokens], stop)[1] and not cut(text[: row.tokens - 1], stop)[1]


def test_a_character_that_is_cut_is_held_back_like_a_stop_string(tokenizer):
    row = StoppingText(tokenizer, ["né"])
    ids = tokenizer.encode("uno né")
    assert "".join(row.push([token]) for token in ids[:-1]) == "uno "
    assert (row.push(ids[-1:]), row.flush(), row.tokens) == ("", "", len(ids))


def test_texts_and_tokens_end_where_those_of_transformers_do(folder, tokenizer, model):
    plain = generate(model, PROMPTS, max_new_tokens=NEW)
    stop = [find_pair(plain.texts[0], 8), find_pair(plain.texts[1], 20)]
    streamed = ["", "", ""]

    def add(new):
        streamed[:] = [text + more for text, more in zip(streamed, new, strict=True)]

    found = generate(model, PROMPTS, max_new_tokens=NEW, stop=stop, stream=add, logprobs=0)
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt)
        with torch.no_grad():
            whole = reference.generate(
                torch.tensor([ids]),
                max_new_tokens=NEW,
                do_sample=False,
                stop_strings=stop,
                tokenizer=wrapped,
                pad_token_id=END,
            )
        theirs = [token for token in whole[0, len(ids) :].tolist() if token != END]
        assert found.result.tokens[i] == theirs
        text, stopped = cut(plain.texts[i], stop)
        assert found.texts[i] == streamed[i] == text
        if stopped:
            assert len(theirs) < len(plain.result.tokens[i])
            assert found.result.finish_reasons[i] == "stop"
            assert found.result.logprobs is not None
            assert len(found.result.logprobs[i]) == len(theirs)
    assert any(len(text) < 20 for text in found.texts)


def find_pair(text: str, start: int) -> str:
    """Two ASCII characters in the text, from `start` on, that are not in it before."""
    for i in range(start, len(text) - 1):
        pair = text[i : i + 2]
        if pair.isascii() and pair not in text[: i + 1]:
            return pair
    raise AssertionError(f"no such pair in {text!r}")


def test_a_stop_string_that_is_a_special_token_ends_the_text_too(model, folder):
    """Texts omit special tokens, so that it could not be found there."""
    plain = generate(model, PROMPTS[:1], max_new_tokens=8).result.tokens[0]
    tokenizer = Tokenizer.from_folder(folder)
    name = tokenizer.backend.id_to_token(plain[4])
    assert name is not None
    tokenizer.backend.add_special_tokens([name])
    found = generate(model, PROMPTS[:1], max_new_tokens=8, stop=name, tokenizer=tokenizer)
    assert found.result.tokens[0] == plain[: plain.index(plain[4])]
    assert found.result.finish_reasons == ["stop"]


def test_a_token_that_ends_texts_in_the_models_config_alone_ends_them(model, monkeypatch):
    """As the `text_config` of a model beside others, which no tokenizer reads."""
    plain = generate(model, PROMPTS[:1], max_new_tokens=8).result.tokens[0]
    config = dataclasses.replace(model.config, eos_token_ids=(plain[4],))
    monkeypatch.setattr(model, "config", config)
    found = generate(model, PROMPTS[:1], max_new_tokens=8).result
    assert found.tokens[0] == plain[: plain.index(plain[4])]


@pytest.mark.parametrize("stop", [["a", ""], None, [3]])
def test_what_is_no_stop_string_is_refused(model, stop):
    with pytest.raises(InputError, match="stop: expected strings of at least one character"):
        generate(model, "Hi", stop=stop)


@pytest.mark.parametrize(
    "prompts", [[1, 2, 3], [[1, 2]], [{"role": "user", "content": "Hi"}], {"role": "user"}, None]
)
def test_what_is_no_text_is_refused_with_the_way_out(model, prompts):
    with pytest.raises(InputError, match=r"prompts: expected texts.*generate_tokens.*encode_chat"):
        generate(model, prompts)


def test_a_numpy_row_of_tokens_is_a_row(tokenizer):
    assert StoppingText(tokenizer).push(np.array(tokenizer.encode("abc"))) == "abc"
