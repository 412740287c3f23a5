"""Let Hypothesis make mutants of one mutation, have each checked, and count them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.files import Entry


class _Mutant(Protocol):
    @property
    def files(self) -> Any: ...


@dataclasses.dataclass
class Figures:
    """Of the mutants of one mutation.

    Attributes:
      mutants: how many were checked; `distinct` are different.
      seconds: of all together.
      worst_seconds, worst_bytes: of the one that took most.
    """

    mutants: int = 0
    distinct: int = 0
    seconds: float = 0.0
    worst_seconds: float = 0.0
    worst_bytes: int = 0

    def add(self, seconds: float, nbytes: int) -> None:
        """Count one."""
        self.mutants += 1
        self.seconds += seconds
        self.worst_seconds = max(self.worst_seconds, seconds)
        self.worst_bytes = max(self.worst_bytes, nbytes)


def draw_mutants(
    make_mutant: Callable[[str, str, dict[str, Entry]], Any],
    bases: dict[str, Any],
    mutate: Callable[[st.DrawFn, dict[str, Entry]], str],
) -> st.SearchStrategy[Any]:
    """What `make_mutant(base, what was done, files)` makes of every base by one mutation."""

    @st.composite
    def make(draw: st.DrawFn) -> Any:
        base = draw(st.sampled_from(sorted(bases)))
        files: dict[str, Entry] = dict(bases[base])
        return make_mutant(base, mutate(draw, files), files)

    return make()


def drive(
    mutants: st.SearchStrategy[Any],
    count: int,
    start: int,
    check: Callable[[Any], None],
    *,
    report_multiple_bugs: bool = True,
) -> int:
    """Check `count` mutants, the same ones for the same `start`; how many were different.

    Raises:
      AssertionError: with the smallest mutant that breaks the promise (or what it raised instead).
    """
    seen: set[Hashable] = set()

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        report_multiple_bugs=report_multiple_bugs,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutants)
    def run(mutant: _Mutant) -> None:
        check(mutant)
        seen.add(hash(tuple(sorted(mutant.files.items()))))

    run()
    return len(seen)
