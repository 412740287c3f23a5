"""Texts that end at a stop string: what the harness calls generate_until."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs

from jaxwna16.errors import InputError
from jaxwna16.generation import generate_tokens
from jaxwna16.text import Tokenizer

_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class Options(NamedTuple):
    """How a task wants its texts generated."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float


class _AllStopped(Exception):
    """Raised out of a stream of tokens: no row needs any more."""


def read_options(gen_kwargs: Mapping[str, Any], max_gen_toks: int) -> Options:
    """Read a task's `generation_kwargs`; `max_gen_toks` is for those that do not say.

    Raises:
      InputError: if there is one that we do not have.
    """
    given: dict[str, Any] = {**normalize_gen_kwargs(dict(gen_kwargs), max_gen_toks)}
    if unknown := sorted(set(given) - _OPTIONS):
        raise InputError(
            f"generation_kwargs: the model jaxwna16 has no {', '.join(unknown)}; it knows "
            f"{', '.join(sorted(_OPTIONS))}"
        )
    return Options(
        until=tuple(text for text in given["until"] if text),
        max_new_tokens=given["max_gen_toks"],
        # greedy unless a task asks for draws and says how warm
        temperature=float(given.get("temperature") or 0.0) if given["do_sample"] else 0.0,
        top_k=int(given.get("top_k") or 0),
        top_p=float(given.get("top_p") or 1.0),
    )


def generate_batch(
    model: Any, tokenizer: Tokenizer, prompts: list[list[int]], options: Options, seed: int
) -> list[str]:
    """Continue each prompt up to its first stop string, which is not part of the text."""
    added = tokenizer.backend.get_added_tokens_decoder().items()
    stop_tokens = {token for token, entry in added if entry.content in options.until}
    tokens: list[list[int]] = [[] for _ in prompts]

    def take(new: list[list[int]]) -> None:
        for row, ids in zip(tokens, new, strict=True):
            row += ids
        # a row that gets nothing has met a stop token
        if all(not ids or cut(row)[1] for row, ids in zip(tokens, new, strict=True)):
            raise _AllStopped

    def cut(row: list[int]) -> tuple[str, bool]:
        text = tokenizer.decode(row)
        ends = [end for stop in options.until if (end := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text, bool(ends)

    with contextlib.suppress(_AllStopped):
        generate_tokens(
            model,
            prompts,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=seed,
            stop_tokens=sorted(tokenizer.stop_tokens | stop_tokens),
            stream=take,
        )
    return [cut(row)[0] for row in tokens]
