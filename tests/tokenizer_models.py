"""Members of tokenizer.json that several tests write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def describe_bpe(vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """The `model` of a byte-pair encoding that joins a and b, as `tokenizers` writes it."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [["a", "b"]],
    }
