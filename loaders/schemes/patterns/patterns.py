"""Regular expressions that come with a checkpoint, compiled only if matching them must end soon.

Python's `re` goes back and forth: `(.*.*)*x` takes half a minute for a name of 16 characters. Since
a config.json may say anything, patterns are refused that repeat a group in which something repeats
or can be read in two ways, and those with more than four repeats one after the other. What tools
write ("re:.*mlp\\.experts\\.\\d+\\.(gate|up)_proj$") has neither.
"""

from __future__ import annotations

import re
import warnings

_MAX_REPEATS, _MAX_CHOICES = 4, 12
_REPEAT, _CHOICE = "\0", "\1"  # stand for many repeats, and for more than one way
_OPENING = r"\(\?(?:P?<\w+>|<?[=!]|[:>]|[a-zA-Z-]+:?)"
# what is one character; a run without a dot and the dot behind it can be read in one way alone
_RUN = r"(?:\\d|\[(?:\w(?:-\w)?)+\]|\[\^\\?\.\])[+*]\\\."
_ATOM = _RUN + r"|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[^()|*+?{}^$]"
_TOKENS = re.compile(rf"(?P<kept>{_OPENING}|\{{\d*,?\d*\}})|{_ATOM}", re.DOTALL)
_MANY = re.compile(r"x(?:[*+]|\{\d*,\d*\})[?+]?")
_FEW = re.compile(r"x(?:\?|\{\d+\})[?+]?")
_GROUP = re.compile(rf"(?P<opening>{_OPENING}|\()(?P<body>[^()]*)\)(?P<again>[*+?]|\{{[\d,]*\}})?")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern from a file.

    Raises:
      ValueError: if it is none, or one that could take for ever.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that Python may read differently one day
            compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    if reason := _find_slowness(pattern):
        raise ValueError(f"{reason}, which could take for ever to match")
    return compiled


def _find_slowness(pattern: str) -> str:
    """Why some name could need time beyond its length to the power of `_MAX_REPEATS`, or ""."""
    many = f"repeats more than {_MAX_REPEATS} parts one after the other (write [^.]+ between dots)"
    text = _TOKENS.sub(lambda token: token["kept"] or "x", pattern)
    text = _FEW.sub(_CHOICE, _MANY.sub(_REPEAT, text))
    while group := _GROUP.search(text):
        body, again = group["body"], group["again"]
        repeats, choices = _count(body, _REPEAT), _count(body, _CHOICE) + ("|" in body)
        is_repeated = again not in (None, "?")
        if is_repeated and (repeats or choices):
            return "repeats what repeats itself"
        if repeats > _MAX_REPEATS:
            return many
        short = _REPEAT if is_repeated else _REPEAT * repeats + _CHOICE * (choices + bool(again))
        if group["opening"].endswith(("=", "!")):
            short = ""  # what is only looked at is not tried in another way
        text = text[: group.start()] + short + text[group.end() :]
    if _count(text, _REPEAT) > _MAX_REPEATS:
        return many
    return "leaves too many choices" if _count(text, _CHOICE) > _MAX_CHOICES else ""


def _count(text: str, mark: str) -> int:
    """How many of them follow each other at most."""
    return max(branch.count(mark) for branch in text.split("|"))
