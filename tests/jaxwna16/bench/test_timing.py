"""Medians, with a clock that the test moves."""

from __future__ import annotations

import dataclasses

import pytest

from jaxwna16.bench.timing import Effort, measure

EFFORT = Effort(batch_seconds=1.0, batches=5)


class FakeDevice:
    """Work is queued by `call` and done by `wait`; each call takes the next of the durations."""

    def __init__(self, first: float, then: float):
        self.now, self.queued, self.waits = 0.0, 0.0, []
        self.first, self.then, self.made = first, then, []

    def call(self, made: int) -> int:
        self.made.append(made)
        self.queued += self.then if made else self.first
        return made

    def wait(self, last: int) -> None:
        self.waits.append(last)
        self.now += self.queued
        self.queued = 0.0

    def clock(self) -> float:
        return self.now


def run(device: FakeDevice, effort: Effort = EFFORT, products: int = 1):
    return measure(device.call, device.wait, effort, products=products, clock=device.clock)


def test_compiling_in_the_first_call_does_not_count():
    timing = run(FakeDevice(first=100.0, then=0.01))
    assert timing.median == pytest.approx(0.01)
    assert timing.most == pytest.approx(0.01)


def test_calls_are_queued_until_a_batch_is_long_enough():
    device = FakeDevice(first=0.01, then=0.01)
    timing = run(device)
    assert timing.calls * 0.01 >= EFFORT.batch_seconds
    assert timing.calls * 0.01 < 1.5 * EFFORT.batch_seconds
    assert timing.batches == EFFORT.batches
    # one wait a batch, for the last call of it
    assert device.waits[-5:] == device.made[-1 :: -timing.calls][:5][::-1]


def test_every_call_is_numbered_so_that_buffers_take_turns():
    device = FakeDevice(first=0.1, then=0.1)
    run(device)
    assert device.made == list(range(len(device.made)))


def test_a_call_longer_than_a_batch_is_a_batch():
    device = FakeDevice(first=7.0, then=7.0)
    timing = run(device, products=7)
    assert timing.calls == 1
    assert timing.median == pytest.approx(1.0)
    assert len(device.made) == 2 + EFFORT.batches


def test_one_slow_batch_moves_the_most_and_not_the_median():
    device = FakeDevice(first=1.0, then=1.0)
    effort = dataclasses.replace(EFFORT, batches=9)

    def stumble(made: int) -> int:
        device.queued += 50.0 if made == 6 else 0.0
        return device.call(made)

    timing = measure(stumble, device.wait, effort, clock=device.clock)
    assert (timing.least, timing.median, timing.most) == pytest.approx((1.0, 1.0, 51.0))


def test_a_clock_that_does_not_move_at_first_only_means_more_calls():
    device = FakeDevice(first=0.0, then=0.0)

    def call(made: int) -> int:
        device.queued += 0.01 if made > 30 else 0.0
        return made

    assert measure(call, device.wait, EFFORT, clock=device.clock).median == pytest.approx(0.01)
