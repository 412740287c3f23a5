"""The ignore list of config.json: the number of modules that each entry matches.

If an entry matches fewer modules than intended, no check can notice: the others are quantized, with
good integers. So `inspect` shows the counts, and near misses.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from loaders.errors import cut_text
from loaders.modules.experts import split_name
from loaders.plan import Plan
from loaders.schemes.module_names import star_numbers
from loaders.schemes.patterns.patterns import compile_pattern
from loaders.schemes.quantization_config import parse_quantization

_SLICE = re.compile(r"\[[0-9]+\]$")
_WORD = re.compile(r"[A-Za-z_]\w{3,}")
_PATTERN = "re:"
_MOST_ROWS, _MOST_CHARACTERS = 200, 500
_ALIKE = 0.85  # shared_experts and shared_expert are 0.96 alike, q_proj and k_proj 0.83


def count_ignored(plan: Plan) -> list[dict[str, Any]]:
    """The entries of the ignore list; names that differ only in numbers are one row.

    `modules` counts the modules with a matrix that an entry matches. `of` counts the modules that
    have the same names except for the numbers of layers and experts. If an entry matches nothing,
    `near` is a spelling that would match `near_modules` packed modules; else "" and 0.
    """
    quantization, _ = parse_quantization(dict(plan.config))
    packed = _list_unsliced([*plan.quantized])
    plain = [split_name(name) for name, info in plan.plain.items() if len(info.shape) > 1]
    modules = [*packed, *_list_unsliced([path for path, role in plain if role == "weight"])]
    alike = Counter(map(star_numbers, modules))
    families: dict[str, list[str]] = defaultdict(list)
    matched = quantization.match_ignored(modules)
    for name in matched:
        families[name if name.startswith(_PATTERN) else star_numbers(name)].append(name)
    rows = []
    for entry, names in list(families.items())[:_MOST_ROWS]:
        found = {module for name in names for module in matched[name]}
        is_long = len(entry) > _MOST_CHARACTERS
        near, count = ("", 0) if found or is_long else find_near(entry, packed)
        rows.append(
            {
                "entry": cut_text(entry),
                "entries": len(names),
                "modules": len(found),
                "of": sum(alike[path] for path in set(map(star_numbers, found))),
                "near": near,
                "near_modules": count,
            }
        )
    return rows + _add_up_rest(list(families.values())[_MOST_ROWS:])


def _add_up_rest(families: Sequence[list[str]]) -> list[dict[str, Any]]:
    """One row for entries that are too many to be looked at one by one."""
    if not families:
        return []
    entries = sum(map(len, families))
    numbers = {"entries": entries, "modules": 0, "of": 0, "near": "", "near_modules": 0}
    return [{"entry": f"… and {len(families):,} more names", **numbers}]


def word_near(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A warning for each entry that matches nothing and is almost the name of packed modules."""
    return [
        f"config.json: the ignored {row['entry']!r} matches no module; {row['near']!r} would match "
        f"{row['near_modules']}, which are quantized"
        for row in rows
        if row["near"]
    ]


def find_near(entry: str, packed: Sequence[str]) -> tuple[str, int]:
    """The entry with one word changed that matches most packed modules, and how many; or "", 0."""
    starred = Counter(map(star_numbers, packed))
    words = {word for path in starred for word in path.split(".")}
    found = {near: _count(near, packed, starred) for near in _respell(entry, words)}
    best = max(found, key=lambda near: found[near], default="")
    return (best, found[best]) if found.get(best) else ("", 0)


def _respell(entry: str, words: set[str]) -> Iterator[str]:
    for word in _WORD.finditer(entry, len(_PATTERN) if entry.startswith(_PATTERN) else 0):
        for other in difflib.get_close_matches(word[0], words - {word[0]}, cutoff=_ALIKE):
            yield entry[: word.start()] + other + entry[word.end() :]


def _count(entry: str, packed: Sequence[str], starred: Counter[str]) -> int:
    if not entry.startswith(_PATTERN):
        return starred[entry]
    try:
        pattern = compile_pattern(entry.removeprefix(_PATTERN))
    except ValueError:
        return 0
    return sum(bool(pattern.match(path)) for path in packed)


def _list_unsliced(paths: Sequence[str]) -> list[str]:
    """Paths as in the files. A plan lists stacked experts one by one; a file has one module."""
    return list(dict.fromkeys(_SLICE.sub("", path) for path in paths))
