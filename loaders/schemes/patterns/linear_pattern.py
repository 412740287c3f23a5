"""Regular expressions that are matched in a time linear in the text: `LinearPattern`.

Instead of one way after the other, all states that a pattern can be in are followed at once
(Thompson, "Regular Expression Search Algorithm", 1968), and what a character makes of such a set is
kept. Python's own parser reads the pattern, and `re` itself tests single characters and places, so
that both mean the same. Looking ahead and behind is the same search from another place. What cannot
be followed so is refused: references back to a group, and groups that are never tried again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from re import _compiler, _constants, _parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

from loaders.errors import CheckpointError, Fault
from loaders.files.small_files import CONFIG

_MAX_STATES = 4000
_MAX_KEPT = 20_000  # characters that lead from one set of states to the next
SINGLE = {_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN}
LOOKS = {_constants.ASSERT, _constants.ASSERT_NOT}
_REPEATS = {_constants.MAX_REPEAT, _constants.MIN_REPEAT}
_END = 0

Test = Callable[[str], bool]
Guard = Callable[[str, int], bool]


class SearchError(ValueError):
    """A pattern cannot be matched so."""


@dataclasses.dataclass
class Budget:
    """How many more steps all patterns of one file may take; a step is 0.3 µs or so."""

    steps: int

    def spend(self, steps: int) -> None:
        """Take steps.

        Raises:
          CheckpointError: if there are not as many left.
        """
        self.steps -= steps
        if self.steps < 0:
            what = "the patterns take too long to match with the names of the modules"
            raise CheckpointError(CONFIG, [Fault(what, CONFIG, "", "write fewer or plainer ones")])


@dataclasses.dataclass(eq=False)
class _Node:
    """States that a search can be in, and where characters lead from there."""

    states: frozenset[int]
    edges: dict[str, _Node] = dataclasses.field(default_factory=dict)


class LinearPattern:
    """A pattern of Python's `re`, for `match` alone.

    Args:
      pattern: what `re` compiles.
      budget: the steps that it may take in all.

    Raises:
      SearchError: if it cannot be matched in linear time.
      re.error: if it is no pattern.
    """

    def __init__(self, pattern: str, budget: Budget):
        self.pattern = pattern
        self._budget = budget
        self._tests: list[Test | None] = [None]
        self._guards: list[Guard | None] = [None]
        self._goes: list[tuple[int, ...]] = [()]
        self._nodes: dict[frozenset[int], _Node] = {}
        self._starts: dict[int, _Node] = {}
        self._kept = 0
        parsed = _parser.parse(pattern)
        self._first = self._build(parsed, parsed.state.flags, _END)

    def match(self, text: str) -> bool:
        """Whether the pattern matches from the start of the text."""
        return self._search(self._first, text, 0)

    def _search(self, first: int, text: str, place: int) -> bool:
        node = self._starts.get(first) or self._start(first, text, place)
        for i in range(place, len(text)):
            if _END in node.states:
                return True
            node = node.edges.get(text[i]) or self._follow(node, text, i)
        return _END in node.states

    def _start(self, first: int, text: str, place: int) -> _Node:
        """Where a search begins; kept, unless it depends on the place."""
        node, depends = self._close([first], text, place)
        if not depends:
            self._starts[first] = node
        return node

    def _follow(self, node: _Node, text: str, i: int) -> _Node:
        """Where a character leads; kept, unless it depends on the place."""
        character = text[i]
        tests = [(state, self._tests[state]) for state in node.states]
        moved = [
            go for state, test in tests if test and test(character) for go in self._goes[state]
        ]
        found, depends = self._close(moved, text, i + 1)
        if not depends:
            self._kept += 1
            node.edges[character] = found
        if self._kept > _MAX_KEPT:
            self._kept = 0
            self._nodes.clear()
            self._starts.clear()
        return found

    def _close(self, states: Iterable[int], text: str, place: int) -> tuple[_Node, bool]:
        """All states that are reached without a character; whether that depends on the place."""
        seen, waiting, depends = set(), list(states), False
        while waiting:
            state = waiting.pop()
            if state in seen:
                continue
            seen.add(state)
            guard = self._guards[state]
            depends |= guard is not None
            if self._tests[state] is None and (guard is None or guard(text, place)):
                waiting += self._goes[state]
        self._budget.spend(1 + len(seen))
        kept = frozenset(s for s in seen if s == _END or self._tests[s] is not None)
        return self._nodes.setdefault(kept, _Node(kept)), depends

    def _add(
        self, goes: tuple[int, ...], test: Test | None = None, guard: Guard | None = None
    ) -> int:
        if len(self._goes) >= _MAX_STATES:
            raise SearchError(f"has more than {_MAX_STATES} parts that repeat")
        self._goes.append(goes)
        self._tests.append(test)
        self._guards.append(guard)
        return len(self._goes) - 1

    def _build(self, items: Iterable[Any], flags: int, out: int) -> int:
        """The first state of a sequence that leads to `out`."""
        for kind, value in reversed(list(items)):
            out = self._build_item(kind, value, flags, out)
        return out

    def _build_item(self, kind: Any, value: Any, flags: int, out: int) -> int:
        if kind in SINGLE:
            return self._add((out,), test=_make_test(kind, value, flags))
        if kind is _constants.AT:
            return self._add((out,), guard=_make_guard(kind, value, flags))
        if kind in LOOKS:
            return self._add((out,), guard=self._make_look(kind, value, flags))
        if kind is _constants.BRANCH:
            return self._add(tuple(self._build(branch, flags, out) for branch in value[1]))
        if kind is _constants.SUBPATTERN:
            _, added, dropped, inner = value
            return self._build(inner, change_flags(flags, added, dropped), out)
        if kind in _REPEATS:
            return self._build_repeat(value, flags, out)
        if kind is _constants.FAILURE:  # what (?!) is to newer versions
            return self._add(())
        raise SearchError(f"has a {str(kind).lower()}, whose search could take forever")

    def _build_repeat(self, value: Any, flags: int, out: int) -> int:
        least, most, inner = value
        if most is _constants.MAXREPEAT:
            first = self._add(())
            self._goes[first] = (self._build(inner, flags, first), out)
        else:
            first = out
            for _ in range(most - least):
                first = self._add((self._build(inner, flags, first), out))
        for _ in range(least):
            first = self._build(inner, flags, first)
        return first

    def _make_look(self, kind: Any, value: Any, flags: int) -> Guard:
        direction, inner = value
        back = inner.getwidth()[0] if direction < 0 else 0
        first, wanted = self._build(inner, flags, _END), kind is _constants.ASSERT

        def look(text: str, place: int) -> bool:
            found = place >= back and self._search(first, text, place - back)
            return found == wanted

        return look


def change_flags(flags: int, added: int, dropped: int) -> int:
    """The flags inside of a group that has its own."""
    if added & _parser.TYPE_FLAGS:
        flags &= ~_parser.TYPE_FLAGS
    return (flags | added) & ~dropped


def _make_test(kind: Any, value: Any, flags: int) -> Test:
    """Whether a character is one of those that an item stands for."""
    pattern = _compile_item(kind, value, flags)
    return lambda character: pattern.match(character) is not None


def _make_guard(kind: Any, value: Any, flags: int) -> Guard:
    """Whether a place is of the kind that an item stands for, as `$`."""
    pattern = _compile_item(kind, value, flags)
    return lambda text, place: pattern.match(text, place) is not None


def _compile_item(kind: Any, value: Any, flags: int) -> Any:
    state = _parser.State()
    state.flags = flags
    return _compiler.compile(_parser.SubPattern(state, [(kind, value)]), flags)
