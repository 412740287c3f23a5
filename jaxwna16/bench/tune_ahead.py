"""Finds how much of the next weights small kernels read ahead (`pallas_kernels.tiles.ahead`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from jaxwna16.bench.run import Deadline, describe_failure
from jaxwna16.bench.shapes import STEP_MODELS
from jaxwna16.bench.step import time_case
from jaxwna16.bench.step_cases import StepCase
from jaxwna16.bench.timing import ON_GPU
from jaxwna16.bench.tune import read_tuned
from pallas_kernels.tiles.ahead import fix_ahead
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.tables import write_table

SIZES = (0, *((1 << i) << 20 for i in range(1, 6)))
"""Bytes: none, and 2 to 32 MiB; the L2 caches of our GPUs have 40 MB and more."""
LEAST_GAIN = 0.01
"""Of the time without: less is noise."""


def time_layer(size: int) -> float:
    """Seconds of a layer of Llama-3.1-8B for one row, with `size` bytes read ahead."""
    case = StepCase("layer", STEP_MODELS["llama-3.1-8b"], 1, 4096, "bfloat16")
    with fix_ahead(size):
        return time_case(case, None, ON_GPU).median


def pick_ahead(seconds: Mapping[int, float]) -> int:
    """The fastest number of bytes, or 0 if none gains enough."""
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < (1 - LEAST_GAIN) * seconds[0] else 0


def tune_ahead(
    device: Device,
    path: Path,
    made: dict[str, str],
    deadline: Deadline,
    say: Callable[[str], None],
) -> int:
    """Time a layer with each of `SIZES`, write the best into the table at `path`, and return it.

    Without time left, or where a layer cannot run, the table keeps what it has.

    Args:
      made: with what and when, for people.

    Raises:
      TableError: if there is a table that cannot be used, or is of another device.
    """
    table, seconds = read_tuned(path, device), {}
    for size in SIZES:
        if not deadline.left:
            return table.ahead
        say(f"a layer with {size >> 20} MiB read ahead")
        try:
            seconds[size] = time_layer(size)
        except Exception as error:
            say(f"a layer cannot be timed: {describe_failure(error)}")
            return table.ahead
    best = pick_ahead(seconds)
    if best != table.ahead:
        write_table(path, dataclasses.replace(table, made=made, ahead=best))
    return best
