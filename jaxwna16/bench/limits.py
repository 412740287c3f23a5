"""What this device can do at most, measured in the run that is compared with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxwna16.bench.timing import Effort, measure


@dataclasses.dataclass(frozen=True)
class Limits:
    """Measured ceilings.

    Attributes:
      bytes_per_second: of a large copy, bytes read and bytes written.
      flops_per_second: of a large product of random matrices in `dtype`, multiplications and
        additions.
      dtype: of that product.
      method: what the better of the copies was.
    """

    bytes_per_second: float
    flops_per_second: float
    dtype: str
    method: str


def measure_limits(dtype: str, effort: Effort) -> Limits:
    """Copy `effort.limit_bytes`, and multiply two matrices of side `effort.limit_size`."""
    words = jax.random.bits(jax.random.key(0), (effort.limit_bytes // 4,), jnp.uint32)
    copies: dict[str, Callable] = {"copy": jnp.copy, "bitwise not": jnp.bitwise_not}
    rates = {
        name: 2 * words.nbytes / _time(jax.jit(copy).lower(words).compile(), words, effort=effort)
        for name, copy in copies.items()
    }
    method = max(rates, key=lambda name: rates[name])
    del words
    side = effort.limit_size
    a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in (1, 2))
    multiply = jax.jit(lambda a, b: lax.dot(a, b, preferred_element_type=a.dtype))
    seconds = _time(multiply.lower(a, b).compile(), a, b, effort=effort)
    return Limits(rates[method], 2 * side**3 / seconds, dtype, method)


def _time(function: Callable[..., Any], *arguments: jax.Array, effort: Effort) -> float:
    return measure(lambda _: function(*arguments), jax.block_until_ready, effort).median
