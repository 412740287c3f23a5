"""Looking into what a function is traced to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax


def find_kernels(function: Callable, *args: Any) -> list[Any]:
    """The equations of all compiled Pallas kernels in `function(*args)`.

    Where a kernel stands beside its interpreted twin for another platform, the twin is left out.
    """
    equations = _walk(jax.make_jaxpr(function)(*args).jaxpr)
    return [
        equation
        for equation in equations
        if equation.primitive.name == "pallas_call" and not equation.params["interpret"]
    ]


def _walk(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name == "pallas_call":
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _walk(inner)
