"""Whole tiny checkpoints, with a tokenizer of each kind, templates and settings."""

from __future__ import annotations

import functools
import json
from typing import Any

from tests.fuzz.bases import make_bases as make_weights
from tests.tokenizer_models import describe_bpe

TOKENS = ["<s>", "</s>", "a", "b", "ab", " ", "▁", "é"]
"""Of the model's eight; the decoders below read some of them as spaces and bytes."""
CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}a "
    "{{ message.content | trim }}{% else %}{{ raise_exception('b') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} b{% endif %}"
)


def _add(index: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **flags, "special": True}


def _describe(model: dict[str, Any], **chain: Any) -> dict[str, Any]:
    names = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_add(0, "<s>"), _add(1, "</s>")],
        **{name: chain.get(name) for name in names},
        "model": model,
    }


def _make_tokenizers() -> dict[str, dict[str, Any]]:
    words = {token: index for index, token in enumerate(TOKENS)}
    bpe = describe_bpe(words)
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": begin,
        "pair": begin,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoder = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    split = {"Regex": r"\s+(?!\S)|\s+"}
    return {
        "merges": _describe(
            bpe,
            normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, spaces]},
            post_processor=template,
            decoder={"type": "Sequence", "decoders": decoder},
        ),
        "bytes": _describe(
            bpe | {"vocab": {t if t != " " else "Ġ": i for t, i in words.items()}},
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False},
                    _bytes(),
                ],
            },
            decoder=_bytes(),
        ),
        "pieces": _describe(
            {
                "type": "Unigram",
                "unk_id": 2,
                "vocab": [[token, -float(i)] for i, token in enumerate(TOKENS)],
                "byte_fallback": False,
            },
            pre_tokenizer={
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "always",
                "split": True,
            },
            decoder={
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "always",
                "split": True,
            },
        ),
    }


def _bytes() -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }


@functools.cache
def make_bases() -> dict[str, dict[str, bytes]]:
    """Name -> the files of a checkpoint that generates."""
    settings = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": CHAT,
        "added_tokens_decoder": {"0": _add(0, "<s>") | {"id": None}},
    }
    del settings["added_tokens_decoder"]["0"]["id"]
    generation = {"eos_token_id": [1], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    return {
        name: make_weights()["llama"]
        | {
            "tokenizer.json": json.dumps(described).encode(),
            "tokenizer_config.json": json.dumps(settings).encode(),
            "special_tokens_map.json": json.dumps({"bos_token": "<s>"}).encode(),
            "generation_config.json": json.dumps(generation).encode(),
            **({"chat_template.jinja": CHAT.encode()} if name == "pieces" else {}),
        }
        for name, described in _make_tokenizers().items()
    }
