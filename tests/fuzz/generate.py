"""Let Hypothesis make mutants, check each, and count what became of them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.bases import make_bases
from tests.fuzz.check import Outcome, check_mutant, load_bases
from tests.fuzz.files import Entry
from tests.fuzz.mutations import HARMLESS, MUTATIONS

_SHOWN = 2000


@dataclasses.dataclass(frozen=True, repr=False)
class Mutant:
    """A checkpoint that somebody broke.

    Attributes:
      base: what it was made of (see `tests.fuzz.bases`).
      what: was done to it.
      files: that it has now.
    """

    base: str
    what: str
    files: Mapping[str, Entry]

    def __repr__(self) -> str:
        """What was done, and how the files begin that the base does not have."""
        base = make_bases()[self.base]
        others = {
            name: entry[:_SHOWN] if isinstance(entry, bytes) else entry
            for name, entry in self.files.items()
            if entry != base.get(name)
        }
        gone = sorted(base.keys() - self.files.keys())
        return f"Mutant({self.base!r}, {self.what!r}, without={gone}, files={others})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # Hypothesis prints dataclasses field by field otherwise


@dataclasses.dataclass
class Tally:
    """What became of the mutants of one mutation: refusals by kind, and the worst figures."""

    mutants: int = 0
    distinct: int = 0
    loaded: int = 0
    kinds: Counter[int] = dataclasses.field(default_factory=Counter)
    seconds: float = 0.0
    worst_seconds: float = 0.0
    worst_bytes: int = 0

    def count(self, outcome: Outcome) -> None:
        """Add one."""
        self.mutants += 1
        self.loaded += not outcome.kinds
        self.kinds.update(outcome.kinds)
        self.seconds += outcome.seconds
        self.worst_seconds = max(self.worst_seconds, outcome.seconds)
        self.worst_bytes = max(self.worst_bytes, outcome.nbytes)


def make_mutants(mutation: str) -> st.SearchStrategy[Mutant]:
    """Mutants of every base by one mutation."""

    @st.composite
    def make(draw: st.DrawFn) -> Mutant:
        base = draw(st.sampled_from(sorted(make_bases())))
        files: dict[str, Entry] = dict(make_bases()[base])
        return Mutant(base, MUTATIONS[mutation](draw, files), files)

    return make()


def run(mutation: str, mutants: int, start: int) -> Tally:
    """Check that many mutants; the same ones for the same `start`.

    Raises:
      AssertionError: with the smallest mutant that breaks the promise (or what it raised instead).
    """
    tally, seen = Tally(), set()
    with tempfile.TemporaryDirectory() as root:

        @seed(start)
        @settings(
            max_examples=mutants,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(make_mutants(mutation))
        def check(mutant: Mutant) -> None:
            harmless = mutation in HARMLESS
            tally.count(check_mutant(mutant.base, mutant.files, Path(root), harmless=harmless))
            seen.add(hash(tuple(sorted(mutant.files.items()))))

        load_bases(Path(root))
        check()
    tally.distinct = len(seen)
    return tally
