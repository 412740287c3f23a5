"""Which tokenizers run without limits: those of published models, and none that could use them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxwna16.generation.limited.known_stages import (
    _ALTERNATIVES,
    _LOWER,
    _UPPER,
    MAX_ADDED,
    is_linear,
    is_plain,
)
from tests.jaxwna16.generation.limited.tokenizers_json import GROW, add, describe, split, write

tokenizers = pytest.importorskip("tokenizers")

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
QWEN3_5 = QWEN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
GPT_OSS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
BEGIN = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}},
}
TO_SPACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


def join(kind: str, *stages: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(stages)}


PUBLISHED = {
    "SmolLM2, GPT-2": {
        "pre_tokenizer": join(
            "pretokenizers",
            {"type": "Digits", "individual_digits": True},
            BYTES | {"use_regex": True},
        ),
        "decoder": BYTES,
    },
    "Llama 3": {
        "pre_tokenizer": join("pretokenizers", split(LLAMA3), BYTES),
        "post_processor": join("processors", BYTES, BEGIN),
        "decoder": BYTES,
    },
    "Qwen": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": join("pretokenizers", split(QWEN), BYTES),
        "post_processor": BYTES,
        "decoder": BYTES,
    },
    "Llama 2, Mistral, Mixtral": {
        "normalizer": join(
            "normalizers",
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ),
        "post_processor": BEGIN,
        "decoder": join(
            "decoders",
            TO_SPACE,
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
    },
    "a new Mistral": {
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        },
        "post_processor": BEGIN,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("indent", [None, 2])
def test_tokenizers_of_published_models_run_without_limits(name, indent):
    tokens = [add("<s>", normalized=True), add("}, ", 5), add('"model": {', 6)]
    vocabulary = {"a": 0, "b": 1, "ab": 2, "},": 3, "<s>": 4, '"}, "': 7, ":": 8, "model": 9}
    described = describe(**PUBLISHED[name], added_tokens=tokens, model={"vocab": vocabulary})
    content = json.dumps(described, indent=indent).encode()
    assert is_plain(content)
    written = tokenizers.Tokenizer.from_buffer(content).to_str().encode()
    assert is_plain(written)


DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ALONE = [pattern for pattern in _ALTERNATIVES if is_linear(pattern)]


@pytest.mark.parametrize("pattern", [LLAMA3, QWEN, QWEN3_5, GPT_OSS, DEEPSEEK, *ALONE])
def test_patterns_that_are_known_search_in_linear_time(pattern):
    """Runs of each kind of character, which a quadratic search would take minutes for."""
    assert is_linear(pattern)
    backend = tokenizers.Tokenizer.from_buffer(write(pre_tokenizer=split(pattern)))
    units = ("a", "A", "Aa", "1", " ", "\r", "\n ", "'", "\u0300", "中", " .", "/", "\u02b0")
    for text in ["".join(unit * 30_000 for unit in units), *(u * 30_000 + "\x00" for u in units)]:
        started = time.process_time()
        backend.pre_tokenizer.pre_tokenize_str(text)
        assert time.process_time() - started < 3


@pytest.mark.parametrize("pattern", [r"\s*[\r\n]+", r"\s*[\r\n]", _LOWER])
def test_an_alternative_that_looks_at_a_run_in_vain_is_not_known_alone(pattern):
    assert not is_linear(pattern) and not is_linear(rf"{_UPPER}|\s+|{pattern}")
    assert is_linear(rf"{pattern}|{_UPPER}|\s+")


UNKNOWN = {
    "a stage that grows": {"normalizer": GROW},
    "within a sequence": {"decoder": join("decoders", TO_SPACE, GROW)},
    "a replacement of a pattern": {"normalizer": GROW | {"pattern": {"Regex": "a"}}},
    "one of nothing": {"normalizer": GROW | {"pattern": {"String": ""}, "content": ""}},
    "a sequence in a sequence": {"normalizer": join("normalizers", join("normalizers", GROW))},
    "the same twice": {"pre_tokenizer": join("pretokenizers", BYTES, BYTES)},
    "17 stages": {"decoder": join("decoders", *[TO_SPACE] * 17)},
    "another pattern": {"pre_tokenizer": split(r"\s+|(a|a)*$")},
    "a charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a text that is repeated": {
        "post_processor": BEGIN | {"single": 2 * [{"Sequence": {"id": "A", "type_id": 0}}]}
    },
    "a token of many ids": {
        "post_processor": BEGIN
        | {"special_tokens": {"<s>": {"id": "<s>", "ids": [4] * 17, "tokens": ["<s>"] * 17}}}
    },
    "many added tokens": {
        "added_tokens": [add("x" * 1000, i) for i in range(MAX_ADDED // 1000 + 1)]
    },
    "added tokens that are none": {"added_tokens": [3]},
    "another model": {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}},
    "no type": {"normalizer": {"content": "aa", "pattern": {"String": "a"}}},
    "no object": {"normalizer": "NFC"},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_runs_within_limits(name):
    assert is_plain(write())
    assert not is_plain(write(**UNKNOWN[name]))


def test_what_is_no_tokenizer_is_not_known():
    for content in (b"", b"{", b"[]", b"\xff", b'{"model": {"vocab": {}}}', b"[" * 10**6):
        assert not is_plain(content)
    assert not is_plain(b'{"normalizer":' + b"[" * 10**5 + b', "model": {"vocab": {}}}')


NAMES = st.sampled_from(["normalizer", "decoder", "model", "added_tokens", "type", "vocab"])


@given(
    name=NAMES,
    escaped=st.integers(0, 20),
    space=st.sampled_from(["", " ", "\n\t"]),
    place=st.sampled_from(["before", "head", "vocabulary", "merges", "model", "end"]),
)
def test_no_member_goes_before_one_that_was_read(name, escaped, space, place):
    """A member written twice, in any place and with any escapes, is never overlooked.

    `tokenizers` takes the last; what it then is must be what was judged.
    """
    values = {"normalizer": GROW, "decoder": GROW, "model": None, "added_tokens": [add("zz", 9)]}
    values |= {"type": "WordLevel", "vocab": {"x": 0}}
    spelled = "".join(
        f"\\u{ord(c):04x}" if i == escaped % len(name) else c for i, c in enumerate(name)
    )
    member = f'"{spelled}"{space}:{space}{json.dumps(values[name])}'
    text = json.dumps(describe()).replace('"merges"', f'{space}"merges"')
    marks = {
        "before": ('{"version"', f'{{{member},"version"'),
        "head": ('"added_tokens"', f'{member},"added_tokens"'),
        "vocabulary": ('"vocab"', f'{member},"vocab"'),
        "merges": ('"merges"', f'{member},"merges"'),
        "model": ("]]}", f"]]{space},{space}{member}}}"),
        "end": ("]]}}", f"]]}}{space},{space}{member}}}"),
    }
    old, new = marks[place]
    content = text.replace(old, new, 1).encode()
    assert content != text.encode()
    if not is_plain(content):
        return
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception:
        return
    assert backend.normalizer is None and backend.decoder is None
    assert type(backend.model).__name__ == "BPE"


@given(st.dictionaries(st.text('}],":ab {[\\'), st.integers(0, 99), max_size=8))
def test_no_vocabulary_hides_a_member(vocabulary):
    hidden = describe(model={"vocab": vocabulary, "merges": []}) | {"normalizer": GROW}
    first = json.dumps(hidden).replace('"normalizer"', '"x"', 1)
    last = first[:-1] + f', "normalizer": {json.dumps(GROW)}}}'
    assert not is_plain(last.encode())


def test_a_look_takes_little_of_the_time_that_reading_takes():
    """4 % where there is nothing else to do."""
    words = [f"{i:x}" for i in range(50_000)]
    vocabulary = dict(zip(dict.fromkeys(["a", "b", *words]), range(60_000), strict=False))
    merges = [[w[:-1], w[-1]] for w in words if len(w) > 1 and {w[:-1], w[-1]} <= vocabulary.keys()]
    content = json.dumps(describe(model={"vocab": vocabulary, "merges": merges}), indent=2).encode()
    seconds = []
    for work in (is_plain, tokenizers.Tokenizer.from_buffer):
        started = time.process_time()
        assert work(content)
        seconds.append(time.process_time() - started)
    assert seconds[0] < seconds[1] / 4
