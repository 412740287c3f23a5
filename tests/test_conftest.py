"""Which cases run when not all do."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from tests.conftest import choose_cases


class Item(NamedTuple):
    nodeid: str


@pytest.mark.parametrize(
    ("cases", "most", "chosen"),
    [
        (1, 3, [0]),
        (2, 3, [0, 1]),
        (3, 3, [0, 1, 2]),
        (9, 3, [0, 4, 8]),
        (9, 1, [0]),
    ],
)
def test_cases_are_spread_over_the_grid_of_each_function(cases, most, chosen):
    grid = [Item(f"a.py::test_a[{i}]") for i in range(cases)]
    other = Item("a.py::test_b")
    assert choose_cases([*grid, other], most) == {*(grid[i] for i in chosen), other}
