"""Names with layer numbers, many at a time: `model.layers.*.mlp` and `model.layers.{0-29}.mlp`."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable

from loaders.errors import write_ranges
from loaders.schemes.module_names import star_numbers


def fold_names(names: Iterable[str]) -> list[str]:
    """Fold names that differ only in layer numbers into one, from which each can be recovered.

    ["layers.0.q", "layers.1.q", "layers.3.q"] becomes ["layers.{0-1,3}.q"]. Names are folded only
    if they are all the combinations of their numbers; else they stay as they are.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[star_numbers(name)].append(name)
    return list(itertools.chain.from_iterable(map(_fold, alike.values())))


def _fold(names: list[str]) -> list[str]:
    places = [
        sorted(set(parts)) for parts in zip(*(name.split(".") for name in names), strict=True)
    ]
    if len(names) == 1 or math.prod(map(len, places)) != len(set(names)):
        return names
    return [".".join(p[0] if len(p) == 1 else f"{{{write_ranges(map(int, p))}}}" for p in places)]
