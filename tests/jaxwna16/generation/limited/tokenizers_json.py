"""A tiny tokenizer.json, and stages of a stranger's."""

from __future__ import annotations

import json
from typing import Any

from tests.tokenizer_models import describe_bpe

VOCABULARY = {"a": 0, "b": 1, "ab": 2, "c": 3, "<s>": 4}
GROW = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


def split(pattern: str) -> dict[str, Any]:
    """A pre-tokenizer that searches."""
    pattern_kind = {"Regex": pattern}
    return {"type": "Split", "pattern": pattern_kind, "behavior": "Isolated", "invert": False}


def describe(*, model: dict[str, Any] | None = None, **members: Any) -> dict[str, Any]:
    """The members of a file, in the order in which `tokenizers` writes them."""
    names = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    chain = {name: members.pop(name, None) for name in names}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": members.pop("added_tokens", []),
        **chain,
        "model": {**describe_bpe(VOCABULARY), **(model or {})},
        **members,
    }


def write(**members: Any) -> bytes:
    """The same as a file."""
    return json.dumps(describe(**members)).encode()


def add(content: str, index: int = 4, **flags: Any) -> dict[str, Any]:
    """An added token."""
    names = ("single_word", "lstrip", "rstrip", "normalized")
    return {"id": index, "content": content, **dict.fromkeys(names, False), "special": True} | flags
