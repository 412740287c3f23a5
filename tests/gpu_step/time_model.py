"""What a step would take if a few guesses were right: predictions, never measurements.

A kernel takes as long as its bytes at the rate that it can have, or its products if these take
longer, plus a ramp in which the memory is not busy yet, and never less than a smallest kernel.
Between two kernels is a gap, which is longer outside of a command buffer. A kernel of few programs
cannot have all of the bandwidth: each of them has a certain number of bytes under way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from tests.gpu_step.readings import BEGIN, END, Kernel, Reading


@dataclasses.dataclass(frozen=True)
class Machine:
    """A GPU.

    Attributes:
      bandwidth: bytes per second of a large copy, a guess: nine tenths of the data sheet's.
      flops: of dense products in bfloat16 per second, by the data sheet.
    """

    name: str
    bandwidth: float
    flops: float


MACHINES = {
    "sm_90a": Machine("NVIDIA H200", 4.3e12, 989e12),
    "sm_80": Machine("NVIDIA A100 80 GB", 1.83e12, 312e12),
}


@dataclasses.dataclass(frozen=True)
class Guesses:
    """What nobody knows without a GPU; times in microseconds.

    Attributes:
      efficiency: share of the bandwidth that a large kernel has after its ramp.
      program_rate: bytes per second that one program can have.
      product_efficiency: share of the peak that a large product has.
      ramp: of each kernel.
      least: what the smallest kernel takes.
      gap: between kernels in a command buffer; `launch`: outside of one.
      host: of each step; the loop's predicate goes to the host.
    """

    efficiency: float
    program_rate: float
    product_efficiency: float
    ramp: float
    least: float
    gap: float
    launch: float
    host: float


# fmt: off
GUESSES = {
    "optimistic": Guesses(0.93, 160e9, 0.75, 1.0, 0.9, 0.6, 1.5, 8),
    "central": Guesses(0.85, 110e9, 0.60, 1.5, 1.2, 1.0, 2.0, 15),
    "pessimistic": Guesses(0.75, 70e9, 0.45, 2.2, 1.8, 1.6, 3.0, 25),
}
# fmt: on


def predict_kernel(kernel: Kernel, machine: Machine, guesses: Guesses) -> float:
    """Seconds of all launches of a kernel, with the gaps behind them."""
    rate = guesses.efficiency * machine.bandwidth
    if kernel.programs:
        rate = min(rate, kernel.programs * guesses.program_rate)
    moved = kernel.bytes / rate
    multiplied = kernel.flops / (guesses.product_efficiency * machine.flops)
    gap = guesses.gap if kernel.is_recorded else guesses.launch
    busy = max(moved, multiplied) + kernel.launches * guesses.ramp * 1e-6
    return max(busy, kernel.launches * guesses.least * 1e-6) + kernel.launches * gap * 1e-6


def spread(reading: Reading, kernels: Sequence[Kernel]) -> list[tuple[float, list[Kernel]]]:
    """The parts of a step of the whole model: how often there is each, and its kernels.

    Layers that were not compiled are like those that were, in the same proportion of kinds.
    """
    parts = [(1.0, [k for k in kernels if k.layer in (BEGIN, END)])]
    for kind in dict.fromkeys(reading.kinds):
        times = reading.whole_layers * reading.kinds.count(kind) / len(reading.kinds)
        typical = reading.find_typical(kind)
        parts.append((times, [k for k in kernels if k.layer == typical]))
    return parts


def predict_step(
    reading: Reading, kernels: Sequence[Kernel], machine: Machine, guesses: Guesses
) -> float:
    """Seconds of a step of the whole model."""
    parts = spread(reading, kernels)
    each = (n * sum(predict_kernel(k, machine, guesses) for k in part) for n, part in parts)
    return sum(each) + guesses.host * 1e-6


def count(parts: Iterable[tuple[float, list[Kernel]]], attribute: str) -> float:
    """The sum of an attribute over the parts of a step."""
    return sum(n * sum(getattr(kernel, attribute) for kernel in part) for n, part in parts)


def count_must_move(reading: Reading) -> float:
    """Bytes that a step of the whole model must move."""
    share = reading.whole_layers / len(reading.kinds)
    return share * sum(reading.layer_bytes) + reading.end_bytes


def find_limit(reading: Reading, machine: Machine) -> float:
    """Seconds that no step can be shorter than: the bytes it must move, or its products."""
    flops = count(spread(reading, reading.kernels), "flops")
    return max(count_must_move(reading) / machine.bandwidth, flops / machine.flops)
