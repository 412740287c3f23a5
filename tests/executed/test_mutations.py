"""Real kernels, broken one instruction at a time: each is noticed, or a reason says why not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.executed.cases import list_mutated, name
from tests.executed.compiled import compile_cases
from tests.executed.mutations import (
    KINDS,
    MASKS_OF_COPIES,
    find_reason,
    join_lines,
    list_mutations,
)
from tests.ptx import Fault, Refused

_FEW = 2
"""Places of each kind that `make test` breaks; `make thorough` breaks all."""


@pytest.fixture(scope="module")
def launches():
    found = compile_cases("list_mutated")
    return {
        case: dataclasses.replace(launch, text=join_lines(launch.text))
        for case, launch in found.items()
    }


class Bench:
    """A kernel, the blocks of it that run, and what they compute when it is whole."""

    def __init__(self, case, launch):
        self._work = case.prepare()
        # of a product the first and last features; of a grouping a crowded expert, too
        self._blocks = sorted({0, launch.grid - 1} | ({1} if launch.grid > 8 else set()))
        self._right, _, early = self._work.run_noting_early(launch, self._blocks)
        self._launch = dataclasses.replace(launch, early=early)

    def _run(self, text: str) -> list[np.ndarray]:
        launch = dataclasses.replace(self._launch, text=text)
        return self._work.run(launch, self._blocks)[0]

    def is_noticed(self, text: str) -> bool:
        """Whether the text breaks a rule, or other bits come out."""
        try:
            found = self._run(text)
        except (Fault, Refused):
            return True
        return any(
            found.tobytes() != right.tobytes()
            for found, right in zip(found, self._right, strict=True)
        )


def _choose(text: str, *, thorough: bool):
    """The first and the last places of each kind."""
    for kind in KINDS:
        found = list(list_mutations(text, [kind]))
        yield from found if thorough else found[:1] + found[1:][-(_FEW - 1) :]


@pytest.mark.parametrize("case", list_mutated(), ids=lambda case: f"{case.arch} {name(case)}")
def test_every_broken_kernel_is_noticed(launches, case, request, monkeypatch):
    monkeypatch.setattr("tests.ptx.schedule._MOST_STEPS", 50_000)
    text = launches[case].text
    bench = Bench(case, launches[case])
    missed = [
        f"{mutation.kind}, line {mutation.line + 1}: {mutation.before}"
        for mutation in _choose(text, thorough=request.config.getoption("--thorough"))
        if not bench.is_noticed(mutation.text) and not find_reason(mutation, text, bench.is_noticed)
    ]
    assert missed == []


def test_every_kind_stands_in_some_kernel(launches):
    texts = [launch.text for launch in launches.values()]
    absent = {kind for kind in KINDS if not any(any(list_mutations(t, [kind])) for t in texts)}
    assert len(absent) == 1 and absent < MASKS_OF_COPIES


def test_every_mutation_changes_one_line():
    text = "bar.sync \t0;\nshl.b32 \t%r1, %r2, 3;"
    first, second = list_mutations(text, ["barrier dropped", "shift by one more"])
    assert (first.text, second.text) == (text[12:], text.replace(" 3;", " 4;"))


def test_a_product_of_several_lines_is_put_on_one():
    assert join_lines("a;\nmma.sync.x\n\t{b},\n\t{c};\nd;") == "a;\nmma.sync.x {b}, {c};\nd;"
