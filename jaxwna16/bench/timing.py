"""The median time of work that a device does in the background."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

Clock = Callable[[], float]
"""Seconds since any fixed moment."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a case is timed, and on how much memory.

    Attributes:
      batch_seconds: calls that are queued together take about this long, so that waiting for the
        last one costs nothing beside them.
      batches: how many of those are timed; the result is their median.
      layers: products of a chain, at most.
      chain_flops: a chain has fewer layers where they would compute more than this.
      chain_bytes: likewise, where their results would take more memory than this.
      cold_bytes: copies of a weight take turns; together they are at least this large, several
        times the last level cache, so that each product reads its weight from memory.
      most_bytes: together they are no larger than this, unless a single one is larger.
      limit_bytes: what is copied to measure the bandwidth.
      limit_size: side of the square product that measures the rate.
    """

    batch_seconds: float = 0.008
    batches: int = 9
    layers: int = 64
    chain_flops: float = 4e13
    chain_bytes: float = 2e9
    cold_bytes: int = 256_000_000
    most_bytes: int = 12_000_000_000
    limit_bytes: int = 2_000_000_000
    limit_size: int = 8192


ON_GPU = Effort()
ON_CPU = Effort(
    batch_seconds=0.02,
    batches=5,
    layers=4,
    chain_flops=2e9,
    cold_bytes=100_000_000,
    most_bytes=1_000_000_000,
    limit_bytes=100_000_000,
    limit_size=768,
)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one product: median, least and most of the batches."""

    median: float
    least: float
    most: float
    batches: int
    calls: int


def measure(
    call: Callable[[int], Any],
    wait: Callable[[Any], Any],
    effort: Effort,
    *,
    products: int = 1,
    clock: Clock = time.perf_counter,
) -> Timing:
    """Time `call`, which queues `products` products and returns without waiting.

    The first call compiles, loads and warms up; the second and the batches after it, each twice
    as long as the one before, warm up further until one lasts `batch_seconds`. None of them counts.

    Args:
      call: is given how many calls there were before, so that it can take other buffers each time.
      wait: is given what the last call of a batch returned, and returns when that is there.
      effort: how many batches, and of what length.
      products: what one call computes; times are divided by it.
      clock: tells the time in seconds.
    """
    made = 0

    def run(calls: int) -> float:
        nonlocal made
        begin, last = clock(), None
        for _ in range(calls):
            last = call(made)
            made += 1
        wait(last)
        return clock() - begin

    run(1)
    calls, seconds = 1, run(1)
    while seconds < effort.batch_seconds:
        wanted = calls * effort.batch_seconds / seconds if seconds > 0 else math.inf
        calls = math.ceil(min(2.0 * calls, wanted * 1.05))
        seconds = run(calls)
    times = [run(calls) / (calls * products) for _ in range(effort.batches)]
    return Timing(statistics.median(times), min(times), max(times), len(times), calls)
