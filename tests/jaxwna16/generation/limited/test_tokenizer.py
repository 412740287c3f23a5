"""Tokenizers of a stranger: panics, bombs and patterns without end are errors of ours, soon."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from jaxwna16.errors import InputError
from jaxwna16.generation.limited import tokenizer as limited
from jaxwna16.generation.limited.tokenizer import LimitedTokenizer
from jaxwna16.generation.streaming.stop_strings import StoppingText
from jaxwna16.generation.text import Tokenizer
from tests.jaxwna16.generation.limited.tokenizers_json import GROW, add, split, write

tokenizers = pytest.importorskip("tokenizers")
posix = pytest.mark.skipif(os.name != "posix", reason="limits are the system's")


def read(folder: Path, content: bytes, **config: Any) -> Tokenizer:
    (folder / "tokenizer.json").write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "B", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
PANICS = {
    "a prefix longer than the token": write(model={"continuing_subword_prefix": "#" * 10}),
    "a prefix cut in a character": write(model={"continuing_subword_prefix": "é"}),
    "a broken charsmap": write(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "a charsmap that leads out of itself": write(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}
    ),
    "pieces of no characters": write(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a template with a second text": write(post_processor=TEMPLATE),
    "a pattern with an end of its own": write(pre_tokenizer=split("(a|a)*$")),
    "a decoder that strips what is not there": write(
        decoder={"type": "Strip", "content": "a", "start": 0, "stop": 2**62}
    ),
}


@pytest.mark.parametrize("name", PANICS)
def test_a_panic_of_the_library_is_an_error_that_names_the_folder(tmp_path, name):
    with pytest.raises(InputError, match=str(tmp_path)):
        tokenizer = read(tmp_path, PANICS[name])
        tokenizer.encode("a" * 40 + "b")
        tokenizer.decode([0])


def test_other_ends_of_the_process_are_not_held_back():
    with pytest.raises(KeyboardInterrupt), limited.refuse_failures("x"):
        raise KeyboardInterrupt


def chain(member: str, kind: str, stage: dict[str, Any], times: int) -> bytes:
    return write(**{member: {"type": "Sequence", kind: [stage] * times}})


CUBIC = r"\w*\w*\w*\W"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
REPEATED = {
    **TEMPLATE,
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10**5,
}


def make_deep_vocabulary() -> list[list]:
    return [[chr(0x100 + i) * 10**4, -1.0] for i in range(400)]


# Made when they are asked for, since some are megabytes
WITHOUT_END = {
    "a normalizer that doubles": lambda: chain("normalizer", "normalizers", GROW, 40),
    "one that grows a thousand times": lambda: chain(
        "normalizer", "normalizers", GROW | {"content": "a" * 1000}, 3
    ),
    "one that writes where nothing is": lambda: chain(
        "normalizer", "normalizers", GROW | {"pattern": {"Regex": ""}}, 40
    ),
    "bytes written as characters again and again": lambda: chain(
        "pre_tokenizer", "pretokenizers", BYTES, 40
    ),
    "a template that repeats the text": lambda: write(post_processor=REPEATED),
    "a pattern that is cubic": lambda: write(pre_tokenizer=split(CUBIC)),
    "a pattern that is exponential": lambda: write(pre_tokenizer=split(r"(?:a|a)+(?!a)(?<!a)")),
    "a vocabulary that is a deep tree": lambda: write(
        model={
            "type": "Unigram",
            "unk_id": 0,
            "vocab": make_deep_vocabulary(),
            "byte_fallback": False,
        }
    ),
}


@posix
@pytest.mark.parametrize("name", WITHOUT_END)
def test_what_has_no_end_is_ended(tmp_path, monkeypatch, name):
    """Each took gigabytes or minutes, in the process of the caller."""
    monkeypatch.setattr(limited, "SECONDS", 0.3)
    monkeypatch.setattr(limited, "_MEGABYTES", 512)
    started = time.process_time()
    with pytest.raises(
        InputError, match=r"more than (0\.3 s|\d\.3 s|512 MB)|retry-limit"
    ) as caught:
        tokenizer = read(tmp_path, WITHOUT_END[name]())
        assert isinstance(tokenizer.backend, LimitedTokenizer)
        tokenizer.encode("éa" + "a" * 400 + "b")
    assert str(tmp_path) in str(caught.value)
    assert time.process_time() - started < 5


@posix
def test_a_decoder_that_doubles_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(limited, "DECODE_SECONDS", 0.3)
    monkeypatch.setattr(limited, "_MEGABYTES", 512)
    tokenizer = read(tmp_path, chain("decoder", "decoders", GROW, 40))
    assert tokenizer.decode([1]) == "b"
    with pytest.raises(InputError, match=r"more than (0\.3 s|512 MB)|characters"):
        tokenizer.decode([0])
    assert tokenizer.decode([1]) == "b"


@pytest.mark.parametrize("decoder", [None, BYTES, {"type": "BPEDecoder", "suffix": ""}])
def test_a_token_that_is_a_book_is_refused(tmp_path, decoder):
    """Each character of generated text is looked at, in search of stop strings."""
    content = write(decoder=decoder, model={"vocab": {"a": 0, "b" * 10**6: 1}, "merges": []})
    tokenizer = read(tmp_path, content)
    assert tokenizer.decode([0] * 9).strip()
    with pytest.raises(
        InputError, match=r"1 tokens are [12],000,\d\d\d characters, expected 4,096"
    ):
        tokenizer.decode([1])
    with pytest.raises(InputError, match=r"characters, expected 4,096 each"):
        StoppingText(tokenizer, ["c"]).push([1])


@posix
def test_an_added_token_that_a_normalizer_multiplies_is_ended_while_it_is_read(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(limited, "SECONDS", 0.3)
    monkeypatch.setattr(limited, "_MEGABYTES", 512)
    stages = {"type": "Sequence", "normalizers": [GROW] * 40}
    content = write(normalizer=stages, added_tokens=[add("aa", 5, normalized=True, special=False)])
    with pytest.raises(InputError, match=r"more than (0\.3 s|512 MB)"):
        read(tmp_path, content)


def test_a_limited_tokenizer_is_the_same_as_one_in_this_process(tmp_path):
    normalizer = {"type": "Sequence", "normalizers": [GROW]}
    content = write(normalizer=normalizer, added_tokens=[add("<s>")])
    plain = {"content": "b", "special": True}
    tokenizer = read(tmp_path, content, eos_token="<s>", additional_special_tokens=[plain])
    assert isinstance(tokenizer.backend, LimitedTokenizer)
    reference = tokenizers.Tokenizer.from_buffer(content)
    reference.add_special_tokens([tokenizers.AddedToken("b", special=True)])
    for text in ("", "ab", "aab<s>c", "ccab b"):
        encoding = reference.encode(text)
        assert tokenizer.encode(text) == encoding.ids
        assert tokenizer.backend.encode(text).offsets == encoding.offsets
        for skip in (False, True):
            assert tokenizer.decode(encoding.ids, skip) == reference.decode(encoding.ids, skip)
    assert tokenizer.backend.get_vocab() == reference.get_vocab()
    ours, theirs = (x.get_added_tokens_decoder() for x in (tokenizer.backend, reference))
    assert {i: t.__getstate__() for i, t in ours.items()} == {
        i: t.__getstate__() for i, t in theirs.items()
    }
    assert tokenizer.stop_tokens == {4} and tokenizer.find_special("eos_token") == 4
    assert tokenizer.backend.id_to_token(2) == "ab" and tokenizer.backend.id_to_token(9) is None


@posix
def test_a_limited_tokenizer_is_what_it_was_after_it_met_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(limited, "SECONDS", 0.3)
    flags = {"content": "<t>", "special": True}
    content = write(pre_tokenizer=split(CUBIC))
    tokenizer = read(tmp_path, content, added_tokens_decoder={"5": flags})
    with pytest.raises(InputError, match=r"more than 0\.3 s"):
        tokenizer.encode("a" * 400)
    assert tokenizer.encode("ab<t>") == [2, 5]


@pytest.mark.parametrize("grow", [False, True])
def test_dropout_is_switched_off_with_a_warning(tmp_path, grow):
    """As the tokenizers that transformers builds for a family are: with it, ids are random."""
    normalizer = {"type": "Sequence", "normalizers": [GROW]} if grow else None
    with pytest.warns(UserWarning, match=r"tokenizer\.json: `dropout` 0\.9 is for training"):
        tokenizer = read(tmp_path, write(model={"dropout": 0.9}, normalizer=normalizer))
    assert isinstance(tokenizer.backend, LimitedTokenizer) == grow
    expected = [0, 2] if grow else [2]
    assert all(tokenizer.encode("ab" * 20) == expected * 20 for _ in range(20))


def test_half_a_surrogate_pair_is_no_token(tmp_path):
    tokenizer = read(tmp_path, write(), eos_token="\ud800", bos_token={"content": "a\udfff"})
    assert tokenizer.stop_tokens == frozenset()
    assert tokenizer.find_special("eos_token") is None
    added = {"5": {"content": "\ud800"}}
    with pytest.raises(InputError, match="added_tokens_decoder"):
        read(tmp_path, write(), added_tokens_decoder=added)


@pytest.mark.parametrize("stages", [None, {"type": "Sequence", "normalizers": [GROW]}])
def test_nothing_is_printed_of_a_field_that_is_not_known(tmp_path, capfd, stages):
    """`tokenizers` prints its name on stdout, into the midst of JSON."""
    content = write(normalizer=stages)
    token = {"content": "<t>", "__type": "AddedToken", "x\n{}": 1}
    assert read(tmp_path, content, added_tokens_decoder={"5": token}).encode("<t>") == [5]
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("grow", [False, True])
def test_a_hundred_thousand_special_tokens_are_looked_up_at_once(tmp_path, grow):
    """One by one each was added to an automaton that all are in, or asked for in a call."""
    normalizer = {"type": "Sequence", "normalizers": [GROW]} if grow else None
    names = [f"<{i}>" for i in range(100_000)]
    words = {"vocab": {"a": 0, **{name: i + 1 for i, name in enumerate(names[:20_000])}}}
    content = write(normalizer=normalizer, model=words | {"merges": []})
    started = time.process_time()
    tokenizer = read(tmp_path, content, extra_special_tokens=[*names, "\ud800"])
    assert tokenizer.encode("<19999><7>") == [20_000, 8]
    assert time.process_time() - started < 10


def test_too_many_eos_ids_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"`eos_token_id` has 20,000 ids, expected 10,000 at most"):
        read(tmp_path, write(), eos_token_id=[1] * 20_000)


def test_added_tokens_of_the_settings_are_few(tmp_path):
    tokens = {str(i + 5): {"content": f"{i}" * 50_000} for i in range(30)}
    with pytest.raises(InputError, match=r"2,500,000 characters, expected 1,000,000 at most"):
        read(tmp_path, write(), added_tokens_decoder=tokens)
    wrong = {str(i): {"content": f"<{i}>"} for i in range(1000, 3000)}
    with pytest.raises(InputError, match="and 1997 more") as caught:
        read(tmp_path, write(), added_tokens_decoder=wrong)
    assert len(str(caught.value)) < 1000
