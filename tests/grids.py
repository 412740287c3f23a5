"""Grids of cases that are too many for every run: `make test` takes a part, `make thorough` all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def sample(cases: Iterable[Any], every: int) -> list[Any]:
    """Parameters of a test, of which one in `every` runs always, the first among them."""
    return [_make_case(case, always=not i % every) for i, case in enumerate(cases)]


def cover(*axes: Sequence[Any]) -> list[Any]:
    """All combinations of the axes' values, of which a diagonal runs always.

    Each value of each axis occurs in it: the i-th case has the i-th value of every axis, and a
    shorter axis begins again. A value that is a tuple stands for several parameters.
    """
    sizes = [len(axis) for axis in axes]
    diagonal = {tuple(i % size for size in sizes) for i in range(max(sizes))}
    return [
        _make_case(
            tuple(part for value in values for part in _as_tuple(value)),
            always=places in diagonal,
        )
        for places, values in zip(
            itertools.product(*map(range, sizes)), itertools.product(*axes), strict=True
        )
    ]


def _make_case(case: Any, *, always: bool):
    return pytest.param(*_as_tuple(case), marks=[] if always else [pytest.mark.thorough])


def _as_tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)
