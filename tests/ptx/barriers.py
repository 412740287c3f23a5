"""mbarriers: objects in shared memory that count arrivals.

Source: PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier". A phase is
complete when as many have arrived as the barrier was made for; then the next one begins. Phases
are counted from 0, and waiting for parity p is waiting for the last phase of that parity.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.ptx.faults import Fault


@dataclasses.dataclass
class Barrier:
    """One mbarrier: `missing` arrivals until phase number `phase` is complete."""

    count: int
    missing: int
    phase: int = 0
    tries: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    """Phases, and the warps that have asked for them."""


class Barriers:
    """All of a block, by address."""

    def __init__(self) -> None:
        self._barriers: dict[int, Barrier] = {}
        self._news = False

    def initialize(self, address: int, count: int) -> None:
        if address in self._barriers:
            raise Fault("an mbarrier is initialized that is in use")
        self._barriers[address] = Barrier(count, count)

    def invalidate(self, address: int) -> None:
        self.find(address)
        del self._barriers[address]

    def find(self, address: int) -> Barrier:
        if address not in self._barriers:
            raise Fault("an mbarrier is used that was not initialized")
        return self._barriers[address]

    def arrive(self, address: int) -> None:
        barrier = self.find(address)
        barrier.missing -= 1
        if not barrier.missing:
            barrier.phase, barrier.missing = barrier.phase + 1, barrier.count
            self._news = True

    def is_complete(self, address: int, parity: int) -> bool:
        """Whether the phase of this parity, the current or the one before, is complete."""
        return self.find(address).phase % 2 != parity

    def is_first_try(self, address: int, warps: np.ndarray) -> bool:
        """Whether one of these warps has not yet asked for the current phase or the one before."""
        barrier = self.find(address)
        asked = {(barrier.phase, int(warp)) for warp in warps}
        is_first = not asked <= barrier.tries
        barrier.tries |= asked | {(phase + 1, warp) for phase, warp in asked}
        return is_first

    def take_news(self) -> bool:
        """Whether a phase was completed since the last call."""
        news, self._news = self._news, False
        return news
