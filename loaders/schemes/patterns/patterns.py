"""Regular expressions that come with a checkpoint, all of which are matched soon.

Python's `re` goes back and forth: `(.*.*)*x` takes half a minute for a name of 16 characters, and a
config.json may say anything. So `re` matches the patterns whose steps it can be shown to keep few;
what tools write ("re:.*mlp\\.experts\\.\\d+\\.(gate|up)_proj$") is of this kind. All others are
matched in linear time by `LinearPattern`, which is slower for these. Both mean the same.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from re import _compiler, _constants, _parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

from loaders.errors import Fault
from loaders.files.small_files import CONFIG
from loaders.schemes.patterns.linear_pattern import (
    LOOKS,
    SINGLE,
    Budget,
    LinearPattern,
    SearchError,
)

Pattern = re.Pattern[str] | LinearPattern
"""What has `match`, whose result is true or false."""

_MAX_PATTERNS = 20_000
_MATCHED = 10_000_000_000  # characters; 4 ns each
_MAX_LENGTH = 200_000  # names of all layers may stand in one
_STEPS = 20_000_000  # of all patterns that share a budget: some seconds
_NAME = 100  # characters of a long name
_TIMES = 16
_ENDLESS = 1 << 60
_VARIABLE = frozenset("*+?{|")  # without one of these, there is one way to match


def compile_pattern(pattern: str, budget: Budget | None = None) -> Pattern:
    """Compile a pattern from a file.

    Args:
      pattern: the regular expression.
      budget: of all patterns of the file, from `make_budget`; None is one of its own.

    Raises:
      ValueError: if it is none, or one that could take forever.
    """
    if len(pattern) > _MAX_LENGTH:
        raise ValueError(f"has {len(pattern)} characters, expected {_MAX_LENGTH} at most")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that Python may read differently one day
            compiled = re.compile(pattern)
            if _VARIABLE.isdisjoint(pattern) or _is_quick(_parser.parse(pattern)):
                return compiled
            return LinearPattern(pattern, budget or make_budget())
    except SearchError:
        raise
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression: {error}") from None


def check_distinct(names: Iterable[str], field: str) -> list[Fault]:
    """The fault of more patterns than are compiled in seconds, where they stand."""
    count = len(set(names))
    if count <= _MAX_PATTERNS:
        return []
    what = f"has {count:,} patterns, expected at most {_MAX_PATTERNS:,}"
    return [Fault(what, CONFIG, field, "write fewer: [0-9]+ is any number")]


def make_budget() -> Budget:
    """What the patterns of one file may take together."""
    return Budget(_STEPS)


def check_count(patterns: int, names: Iterable[str]) -> list[Fault]:
    """The fault of more patterns than can be matched with as many names in a minute."""
    length = sum(map(len, names))
    if patterns * length <= _MATCHED:
        return []
    what = f"{patterns:,} patterns for {length:,} characters of names take too long to match"
    return [
        Fault(what, CONFIG, "quantization_config", "write fewer, as re:.*layers\\.[0-9]+\\.mlp")
    ]


def _is_quick(parsed: Sequence[Any]) -> bool:
    """Whether `re` takes few steps, measured by the parts of the pattern, for any long name."""
    items = list(parsed)
    while items and _is_free(*items[-1]):
        items.pop()  # at the end of all, a repeat takes what there is, and is never tried again
    steps = _count_steps(items, 0)
    return steps <= _TIMES * _NAME * (1 + _count_parts(items))


def _is_free(kind: Any, value: Any) -> bool:
    return kind in _REPEATS and value[0] == 0 and _is_single(value[2])


_REPEATS = {getattr(_constants, name) for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")}


def _is_single(items: Sequence[Any]) -> bool:
    return len(items) == 1 and items[0][0] in SINGLE


def _list_inner(kind: Any, value: Any) -> list[Sequence[Any]]:
    """The sequences that are part of an item."""
    if kind is _constants.BRANCH:
        return list(value[1])
    if kind in _REPEATS:
        return [value[2]]
    if kind in LOOKS:
        return [value[1]]
    if kind is _constants.SUBPATTERN:
        return [value[3]]
    return [value] if kind is _constants.ATOMIC_GROUP else []


def _count_parts(items: Iterable[Any]) -> int:
    """How many parts of a pattern are no part of another kind."""
    return sum(
        sum(map(_count_parts, inner)) if (inner := _list_inner(kind, value)) else 1
        for kind, value in items
    )


def _count_steps(items: Iterable[Any], rest: int) -> int:
    """At most how many steps `re` takes, if it takes `rest` of them behind the items."""
    following = None
    for item in reversed(list(items)):
        rest = min(_count_item(item, following, rest), _ENDLESS)
        following = item
    return rest


def _count_item(item: Any, following: Any, rest: int) -> int:
    kind, value = item
    if kind in _REPEATS:
        return _count_repeat(value, following, rest)
    if kind in LOOKS:
        return _count_steps(value[1], 0) + rest
    inner = _list_inner(kind, value)
    return sum(_count_steps(items, rest) for items in inner) if inner else 1 + rest


def _count_repeat(repeat: Any, following: Any, rest: int) -> int:
    least, most, inner = repeat
    if most == 1:
        return _count_steps(inner, rest) + rest
    if _is_single(inner):
        times = least if least == most else _NAME
        # a run of what cannot go on behind it has one end, where the rest is tried
        ways = 1 if least == most or _ends_there(inner[0], following) else _NAME
        return times + ways * rest
    if all(kind in SINGLE for kind, _ in inner):
        return _NAME * (len(inner) + rest)
    return _ENDLESS


def _ends_there(repeated: Any, following: Any) -> bool:
    """Whether the character that must follow is none of those that repeat."""
    if following is None or following[0] is not _constants.LITERAL:
        return False
    character, single = chr(following[1]), _parser.SubPattern(_parser.State(), [repeated])
    return not any(_compiler.compile(single, f).match(character) for f in (0, re.IGNORECASE))
