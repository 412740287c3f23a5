"""Rounds of a loop on the device, whose state is updated in place, as a program to time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxwna16.bench.timing import Effort, Timing, measure

_ROUNDS = 8


def time_rounds(
    fixed: Any, state: Any, advance: Callable[[Any, Any], Any], chain: int, effort: Effort
) -> Timing:
    """Time one of the `chain` operations of a round; `state` is given away."""

    @functools.partial(jax.jit, donate_argnums=1)
    def run(fixed, state, rounds):
        return lax.fori_loop(0, rounds, lambda _, state: advance(fixed, state), state)

    # an array: XLA shall not know how many there are, as it does not in the product
    rounds = min(_ROUNDS, effort.layers)
    number = jnp.int32(rounds)
    program = run.lower(fixed, state, number).compile()
    held = [state]

    def call(made: int) -> Any:
        del made
        held[0] = program(fixed, held[0], number)
        return held[0]

    return measure(call, jax.block_until_ready, effort, products=rounds * chain)
