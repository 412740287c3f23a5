"""Let Hypothesis make mutants, check each, and count what became of them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.bases import make_bases
from tests.fuzz.check import Outcome, check_mutant, load_bases
from tests.fuzz.drive import Figures, draw_mutants, drive
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
class Tally(Figures):
    """What became of the mutants of one mutation, with their refusals by kind."""

    loaded: int = 0
    kinds: Counter[int] = dataclasses.field(default_factory=Counter)

    def count(self, outcome: Outcome) -> None:
        """Add one."""
        self.add(outcome.seconds, outcome.nbytes)
        self.loaded += not outcome.kinds
        self.kinds.update(outcome.kinds)


def make_mutants(mutation: str) -> st.SearchStrategy[Mutant]:
    """Mutants of every base by one mutation."""
    return draw_mutants(Mutant, make_bases(), MUTATIONS[mutation])


def run(mutation: str, mutants: int, start: int) -> Tally:
    """Check that many mutants; the same ones for the same `start`.

    Raises:
      AssertionError: with the smallest mutant that breaks the promise (or what it raised instead).
    """
    tally = Tally()
    with tempfile.TemporaryDirectory() as root:
        load_bases(Path(root))

        def check(mutant: Mutant) -> None:
            harmless = mutation in HARMLESS
            tally.count(check_mutant(mutant.base, mutant.files, Path(root), harmless=harmless))

        tally.distinct = drive(make_mutants(mutation), mutants, start, check)
    return tally
