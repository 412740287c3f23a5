"""A tokenizer in the child: functions that take and return JSON values."""

from __future__ import annotations

import binascii
from typing import Any

import tokenizers

from jaxwna16.generation.limited.lengths import check_length

_open: list[tokenizers.Tokenizer] = []


def open_tokenizer(content: str) -> dict[str, Any]:
    """Read a tokenizer.json, in base 64, and say what `backend.prepare` does."""
    backend = tokenizers.Tokenizer.from_buffer(binascii.a2b_base64(content))
    _open[:] = [backend]
    return prepare(backend)


def prepare(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """Switch off what inference does without; returns the dropout that was, and the decoder.

    The decoder is its JSON, or None.
    """
    backend.no_truncation()
    backend.no_padding()
    dropout = getattr(backend.model, "dropout", None)
    if dropout:
        backend.model.dropout = None
    decoder = None if backend.decoder is None else backend.decoder.__getstate__().decode()
    return {"dropout": dropout, "decoder": decoder}


def encode(text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets."""
    encoding = _open[0].encode(text, add_special_tokens=add_special_tokens)
    return encoding.ids, encoding.offsets


def decode(ids: list[int], skip_special_tokens: bool) -> str:
    """The text of ids.

    Raises:
      ValueError: if it is too long.
    """
    text = _open[0].decode(ids, skip_special_tokens=skip_special_tokens)
    check_length(text, len(ids))
    return text


def add_tokens(tokens: list[dict[str, Any]]) -> int:
    """Add tokens, given as their state."""
    return _open[0].add_tokens([tokenizers.AddedToken(**token) for token in tokens])


def token_to_id(token: str) -> int | None:
    return _open[0].token_to_id(token)


def tokens_to_ids(tokens: list[str]) -> list[int | None]:
    return list(map(_open[0].token_to_id, tokens))


def id_to_token(index: int) -> str | None:
    return _open[0].id_to_token(index)


def list_vocabulary() -> list[tuple[str, int]]:
    return list(_open[0].get_vocab().items())


def list_added_tokens() -> list[tuple[int, dict[str, Any]]]:
    return [(i, t.__getstate__()) for i, t in _open[0].get_added_tokens_decoder().items()]
