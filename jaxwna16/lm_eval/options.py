"""What the harness asks for: numbers of `model_args`, and a task's `generation_kwargs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs

from jaxwna16.errors import InputError

_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class Options(NamedTuple):
    """Arguments of `generate`."""

    stop: tuple[str, ...]
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
        stop=tuple(text for text in given["until"] if text),
        max_new_tokens=given["max_gen_toks"],
        # greedy unless a task asks for draws and says how warm
        temperature=float(given.get("temperature") or 0.0) if given["do_sample"] else 0.0,
        top_k=int(given.get("top_k") or 0),
        top_p=float(given.get("top_p") or 1.0),
    )


def read_number(name: str, value: Any, lowest: int, highest: int | None = None) -> int:
    """Read a number of `model_args`, which may come as its digits.

    Raises:
      InputError: if it is no integer, or not in `lowest` .. `highest`.
    """
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if type(number) is not int or number < lowest or (highest is not None and number > highest):
        limits = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise InputError(
            f"model_args: {name}: expected an integer {limits}, got {value!r}; or leave it out"
        )
    return number
