"""Plain names in `modules_to_not_convert`, of which there may be thousands: looked up, not tried.

As transformers has it (`should_convert_module`), a name keeps a module plain that ends in it, or
that begins with it up to a dot or its end. There the name is a pattern, so its dots are any
character.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

_PLAIN = re.compile(r"[\w.-]+")


def is_plain(name: str) -> bool:
    """Whether an entry is a name, and not a pattern."""
    return _PLAIN.fullmatch(name) is not None


class KeptNames:
    """Names that keep modules plain.

    Args:
      names: all `is_plain`.

    Attributes:
      kinds: how many lookups a module takes at most, by the places of dots in the names.
    """

    def __init__(self, names: Iterable[str]):
        self._names = frozenset(names)
        # length -> places of the dots -> what stands between them -> the names
        self._alike: dict[int, dict[tuple[int, ...], dict[str, list[str]]]] = {}
        for name in self._names:
            dots = tuple(i for i, character in enumerate(name) if character == ".")
            alike = self._alike.setdefault(len(name), {}).setdefault(dots, defaultdict(list))
            alike[_drop(name, dots)].append(name)
        self.kinds = sum(map(len, self._alike.values()))

    def find(self, module: str) -> set[str]:
        """The names that keep a module plain."""
        found = {module[i:] for i in range(len(module)) if module[i:] in self._names}
        for end in _list_ends(module):
            for dots, alike in self._alike.get(end, {}).items():
                found.update(alike.get(_drop(module[:end], dots), ()))
        return found


def _drop(text: str, places: tuple[int, ...]) -> str:
    """The text without the characters at these places."""
    starts, ends = (0, *(place + 1 for place in places)), (*places, len(text))
    return "".join(text[start:end] for start, end in zip(starts, ends, strict=True))


def _list_ends(module: str) -> Iterator[int]:
    """Where a name that the module begins with may end: behind a dot, before one, at the end."""
    for i, character in enumerate(module):
        if character == "." or i == len(module) - 1:
            yield i + 1
        elif module[i + 1] == ".":
            yield i + 1
