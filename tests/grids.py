"""Grids of cases that are too many for every run: `make test` takes a part, `make thorough` all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sample(cases: Iterable[Any], every: int) -> list[Any]:
    """Parameters of a test, of which one in `every` runs always, the first among them."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=[pytest.mark.thorough] if i % every else [],
        )
        for i, case in enumerate(cases)
    ]
