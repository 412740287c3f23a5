r"""Which tokenizers need no limits: those whose every stage is known to take and make little.

A tokenizer.json is a chain of stages. Some of them multiply text (`a` -> `aa`, forty times), and a
pattern of its own can search without end. A chain is *plain* if all its stages stand below, where
each makes at most a few characters of one, and searches in linear time. The tokenizers of almost
all published language models are plain. The others run in `limited.tokenizer`.

The vocabulary, 99 % of the bytes, is not read for that, so that loading takes no longer: JSON is
read up to it, and no member may follow that could take the place of what was read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from loaders.files.safetensors_file import refuse_duplicates

MAX_BYTES = 64 << 20
"""Of a plain tokenizer.json, which takes about ten times that in memory; the largest have 35 MB."""
MAX_ADDED = 1_000_000
"""Characters of all added tokens, each of which takes about 100 bytes in an automaton."""
_MAX_STAGES = 16
_MAX_PIECES = 16
_MODELS = ("BPE", "WordLevel")
_VOCABULARY = re.compile(rb'"vocab"\s*:\s*\{')
_MEMBERS = (
    re.compile(rb'\}\s*,\s*"(?!merges"|unk_token")[A-Za-z\\]'),
    re.compile(rb'\]\s*,\s*"(?!unk_token")[A-Za-z\\]'),
)
"""The name of a member behind an object or a list, but for those which follow a vocabulary.

No string is mistaken for one: a quote in it has a backslash, and none of these follows its end.
"""
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ALTERNATIVES = {
    **dict.fromkeys(
        (
            *(
                _ENDING,
                r"(?i:[sdmt]|ll|ve|re)",
                r"'(?i:[sdmt]|ll|ve|re)",
                "'s|'t|'re|'ve|'m|'ll|'d",
            ),
            *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{L}+"),
            *(r" ?\p{L}+", r"\s?\p{L}+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r"\s?\p{P}+"),
            *(r"\p{N}", r"\p{N}+", r" ?\p{N}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+"),
            *(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
            *(r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r" ?[\p{P}\p{S}]+[\r\n]*", r"[\r\n]"),
            *(r"\s+(?!\S)", r"\s+", r"[\p{Han}]+", r"[一-龥぀-ゟ゠-ヿ]+", r"[一-龥ࠀ-一가-퟿]+"),
            *(
                r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
                _UPPER,
                f"{_UPPER}{_ENDING}?",
            ),
        ),
        "",
    ),
    r"\s*[\r\n]": r"\s+",
    r"\s*[\r\n]+": r"\s+",
    _LOWER: _UPPER,
    f"{_LOWER}{_ENDING}?": f"{_UPPER}{_ENDING}?",
}
"""Alternatives of the patterns of GPT-2, Llama 3, Qwen, GLM, DeepSeek, Mistral and the like.

Some look at a whole run of characters, and match none of it. Each stands with the alternative that
must follow it in the pattern and takes that run, or the next search would look at the run again.
"""
_NORMALIZERS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "BertNormalizer", "Nmt"),
    "ByteLevel",
}
_PRE_TOKENIZERS = {
    *("ByteLevel", "Metaspace", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"),
    *("BertPreTokenizer", "UnicodeScripts", "CharDelimiterSplit"),
}
_PROCESSORS = {"ByteLevel", "BertProcessing", "RobertaProcessing"}
_DECODERS = {"ByteLevel", "Metaspace", "WordPiece", "Fuse", "ByteFallback", "Strip"}
_OFTEN = {"Replace", "Split", "Strip", "Digits", "Punctuation"}
"""Stages that make no more of a text; the others can, if only a little, and stand in a chain once.
"""


def is_plain(content: bytes) -> bool:
    """Whether a tokenizer.json can be given to the package `tokenizers` without limits.

    False for whatever is not understood, and so for what is no tokenizer.json at all.
    """
    head = _read_head(content) if len(content) <= MAX_BYTES else None
    return (
        head is not None
        and _are_few(head.get("added_tokens"))
        and _is_chain(head.get("normalizer"), "normalizers", _is_normalizer)
        and _is_chain(head.get("pre_tokenizer"), "pretokenizers", _is_pre_tokenizer)
        and _is_chain(head.get("post_processor"), "processors", _is_processor)
        and _is_chain(head.get("decoder"), "decoders", _is_decoder)
    )


def _read_head(content: bytes) -> dict[str, Any] | None:
    """All before the vocabulary, if it is certain that nothing behind it changes that."""
    vocabulary = _VOCABULARY.search(content)
    if vocabulary is None or any(m.search(content, vocabulary.start()) for m in _MEMBERS):
        return None
    head = content[: vocabulary.start()].rstrip().removesuffix(b",") + b"}}"
    try:
        members = json.loads(head, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError):
        return None
    *_, (last, model) = members.items()
    return members if last == "model" and model.get("type") in _MODELS else None


def _are_few(added: Any) -> bool:
    entries = [] if added is None else added
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        return False
    contents = [entry.get("content") for entry in entries]
    return all(isinstance(c, str) for c in contents) and sum(map(len, contents)) <= MAX_ADDED


def _is_chain(stage: Any, members: str, is_known: Callable[[Mapping[str, Any]], bool]) -> bool:
    """Whether a stage, or each of a sequence, is known, and all but `_OFTEN` stand there once."""
    stages = [] if stage is None else [stage]
    if isinstance(stage, dict) and stage.get("type") == "Sequence":
        stages = stage.get(members)
    if not isinstance(stages, list) or len(stages) > _MAX_STAGES:
        return False
    if not all(isinstance(s, dict) and isinstance(s.get("type"), str) for s in stages):
        return False
    single = [stage["type"] for stage in stages if stage["type"] not in _OFTEN]
    return all(map(is_known, stages)) and len(single) == len(set(single))


def _is_normalizer(stage: Mapping[str, Any]) -> bool:
    match stage:
        case {"type": "Prepend", "prepend": str(text)}:
            return len(text) <= _MAX_PIECES
    return stage["type"] in _NORMALIZERS or _is_replacement(stage)


def _is_pre_tokenizer(stage: Mapping[str, Any]) -> bool:
    match stage:
        case {"type": "Split", "pattern": {"String": str(text)}}:
            return text != ""
        case {"type": "Split", "pattern": {"Regex": str(pattern)}}:
            return is_linear(pattern)
    return stage["type"] in _PRE_TOKENIZERS


def _is_processor(stage: Mapping[str, Any]) -> bool:
    """A template has the text once, and few ids beside it."""
    match stage:
        case {"type": "TemplateProcessing", "single": list(pieces), "special_tokens": dict(tokens)}:
            texts = sum(isinstance(p, dict) and "SpecialToken" not in p for p in pieces)
            ids = [token.get("ids") for token in tokens.values() if isinstance(token, dict)]
            few = all(isinstance(i, list) and len(i) <= _MAX_PIECES for i in ids)
            return texts <= 1 and few and len(pieces) <= _MAX_PIECES
    return stage["type"] in _PROCESSORS


def _is_decoder(stage: Mapping[str, Any]) -> bool:
    return stage["type"] in _DECODERS or _is_replacement(stage)


def _is_replacement(stage: Mapping[str, Any]) -> bool:
    """Of a string by one that is no longer."""
    match stage:
        case {"type": "Replace", "pattern": {"String": str(text)}, "content": str(content)}:
            return text != "" and len(content) <= len(text)
    return False


def is_linear(pattern: str) -> bool:
    """Whether a pattern consists of known alternatives, and searches a text in linear time."""
    needed: set[str] = set()
    while pattern:
        known = [p for p in _ALTERNATIVES if pattern == p or pattern.startswith(f"{p}|")]
        if not known:
            return False
        found = max(known, key=len)
        needed = {*needed, _ALTERNATIVES[found]} - {found, ""}
        pattern = pattern[len(found) + 1 :]
    return not needed
