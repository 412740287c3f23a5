"""Looking into what a function is traced to."""

from __future__ import annotations

import math
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


def find_largest(function: Callable, *args: Any) -> int:
    """Elements of the largest array that `function(*args)` computes on its way."""
    equations = _walk(jax.make_jaxpr(function)(*args).jaxpr)
    return max(math.prod(out.aval.shape) for equation in equations for out in equation.outvars)


def count_flops(function: Callable, *args: Any) -> int:
    """Multiplications and additions of all matrix products, loops counted as often as they run."""
    return _count_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _count_flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contract = equation.params["dimension_numbers"][0][0]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contract)
            total += 2 * depth * equation.outvars[0].aval.size
        inner = [
            _count_flops(body)
            for value in equation.params.values()
            for body in (value if isinstance(value, tuple | list) else (value,))
            for body in (getattr(body, "jaxpr", body),)
            if hasattr(body, "eqns")
        ]
        # of branches, the most expensive one
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += repeats * (
            max(inner, default=0) if equation.primitive.name == "cond" else sum(inner)
        )
    return total
