"""Texts that end at a stop string: what the harness calls generate_until."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs

from jaxwna16.errors import InputError
from jaxwna16.generation import generate_tokens
from jaxwna16.stop_strings import StoppingText, find_stop_tokens
from jaxwna16.text import Tokenizer

_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class Options(NamedTuple):
    """How a task wants its texts generated."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float


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
    rows = [StoppingText(tokenizer, options.until) for _ in prompts]

    def push(new: list[list[int]]) -> dict[int, int]:
        for row, ids in zip(rows, new, strict=True):
            row.push(ids)
        return {i: row.tokens for i, row in enumerate(rows) if row.stopped}

    result = generate_tokens(
        model,
        prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=seed,
        stop_tokens=sorted(tokenizer.stop_tokens | find_stop_tokens(tokenizer, options.until)),
        stream=push,
    )
    return [
        row.text if row.stopped else tokenizer.decode(ids)
        for row, ids in zip(rows, result.tokens, strict=True)
    ]
