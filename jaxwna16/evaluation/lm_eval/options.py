"""What the harness asks for: numbers of `model_args`, and a task's `generation_kwargs`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs

from jaxwna16.errors import InputError

_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
_FLAGS: dict[object, bool | None] = {
    **{True: True, "true": True, "1": True, False: False, "false": False, "0": False},
    **{None: None, "none": None},
}
_OWN_VARIABLES = ("messages", "add_generation_prompt", "continue_final_message", "chat_template")


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
        # greedy unless a task asks for draws and gives a temperature
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


def read_flag(name: str, value: Any) -> bool | None:
    """Read a bool of `model_args`, which may come as a word; None, or "none", is not given.

    Raises:
      InputError: if it is none of these.
    """
    try:
        return _FLAGS[value.lower() if isinstance(value, str) else value]
    except (KeyError, TypeError):
        raise InputError(
            f"model_args: {name}: expected a bool (True or False), got {value!r}; or leave it out"
        ) from None


def read_template_args(value: Any) -> dict[str, Any]:
    """Read `chat_template_args`: an object, or the text of one in JSON; None is an empty one.

    Raises:
      InputError: if it is neither, or names a variable that the harness itself sets.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else {} if value is None else value
    except ValueError:
        found = value
    if not isinstance(found, Mapping):
        raise InputError(
            f"model_args: chat_template_args: expected an object, got {value!r}: in --model_args "
            """'{"pretrained": "DIR", "chat_template_args": {"name": 1}}' it is written so"""
        )
    if taken := [name for name in _OWN_VARIABLES if name in found]:
        raise InputError(
            f"model_args: chat_template_args: {', '.join(taken)} cannot be among them, these are "
            "set by the harness (--apply_chat_template)"
        )
    return dict(found)
