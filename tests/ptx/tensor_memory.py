"""Tensor memory of sm_100: 128 lanes by 512 columns of 32 bits, the tensor cores' own.

Source: PTX ISA, "TensorCore 5th Generation Family Instructions". Loads, stores and products go on
in the background:

* a load is done after `tcgen05.wait::ld`, a store after `tcgen05.wait::st`, by the warp itself;
* products are done when a thread has seen the mbarrier that `tcgen05.commit` names complete.
  Products are numbered by the commit that follows them, and every warp knows up to which number
  it, or a warp that it met at a barrier since, has seen them done;
* between warps there must be a barrier, as for shared memory. A product needs none behind it: a
  warp that has seen it done may touch its sums, and write over its factors in shared memory,
  whichever warp issued it. ("Canonical synchronization patterns": the mbarrier of `tcgen05.commit`
  orders a product before what follows the wait, in any thread.)
"""

from __future__ import annotations

import numpy as np

from tests.ptx.faults import Fault, check

LANES, COLUMNS = 128, 512


class TensorMemory:
    """The tensor memory that one block sees."""

    def __init__(self, seen: np.ndarray):
        """`seen`: int32 [warps], up to which number each warp has seen products done; kept here."""
        self._cells = np.zeros((LANES, COLUMNS), np.uint32)
        self._start = 0
        """64 times the epoch."""
        self._writer, self._reader = (np.full((LANES, COLUMNS), -1, np.int64) for _ in range(2))
        self._storing, self._loading = (np.zeros((LANES, COLUMNS), np.bool_) for _ in range(2))
        self._summed, self._used = (np.zeros((LANES, COLUMNS), np.int32) for _ in range(2))
        """Number of the last product that writes a cell, 0 after a store; or reads it."""
        self._shapes: dict[tuple, int] = {}
        """Sums -> number of their last product."""
        self._allocated = np.zeros(COLUMNS, np.bool_)
        self._may_allocate = True
        self._seen = seen
        self._committed = 0
        self._phases: dict[tuple[int, int], int] = {}

    def allocate(self, columns: int) -> int:
        """The first of so many columns. They come from the end, so that none begin at 0."""
        check(self._may_allocate, "tensor memory is allocated after the permit was given back")
        check(columns in (32, 64, 128, 256, 512), f"{columns} columns of tensor memory")
        start = COLUMNS - columns - int(self._allocated.sum())
        check(start >= 0, "no tensor memory is left")
        self._allocated[start : start + columns] = True
        return start

    def stop_allocating(self) -> None:
        self._may_allocate = False

    def free(self, start: int, columns: int) -> None:
        check(self._allocated[start : start + columns], "tensor memory is freed twice")
        self._allocated[start : start + columns] = False

    def load(self, warp: int, lanes: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """uint32, of the cells at lanes [32, 1] and columns [32, n]."""
        at = self._find(lanes, columns)
        check(self._summed[at] <= self._seen[warp], "a sum is read before its product is done")
        self._check_readable(at, warp)
        tag = self._start + warp
        seen = self._reader[at]
        self._reader[at] = np.where((seen < self._start) | (seen == tag), tag, self._start + 63)
        self._loading[at] = True
        return self._cells[at]

    def store(self, warp: int, lanes: np.ndarray, columns: np.ndarray, data: np.ndarray) -> None:
        """Set those cells."""
        at = self._find(lanes, columns)
        done = (self._summed[at] <= self._seen[warp]) & (self._used[at] <= self._seen[warp])
        check(done, "tensor memory is written before the product that uses it is done")
        self._check_writable(at, warp)
        self._cells[at] = data
        self._writer[at], self._summed[at] = self._start + warp, 0
        self._storing[at] = True

    def end_loads(self, warp: int) -> None:
        """Loads of other warps that share these lanes go on, in other columns."""
        self._end(self._loading, self._reader, warp)

    def end_stores(self, warp: int) -> None:
        self._end(self._storing, self._writer, warp)

    def use(self, warp: int, lanes: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The cells that a product issued by this warp multiplies."""
        at = self._find(lanes, columns)
        self._check_readable(at, warp)
        check(self._summed[at] <= self._seen[warp], "a product reads a sum that is not done")
        self._used[at] = self.number
        return self._cells[at]

    def read_sum(self, warp: int, lanes: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """What a product issued by this warp adds to: a sum of the same shape need not be done."""
        at = self._find(lanes, columns)
        self._check_readable(at, warp)
        return self._cells[at]

    def add(self, warp: int, lanes: np.ndarray, columns: np.ndarray, sums: np.ndarray) -> None:
        """The sums of a product that is on its way."""
        at = self._find(lanes, columns)
        shape = (lanes.tobytes(), columns.tobytes())
        in_order = self._summed[at] == self._shapes.get(shape, 0)
        check(
            in_order | (self._summed[at] <= self._seen[warp]),
            "a product writes to sums of another shape that are not done",
        )
        check(self._used[at] <= self._seen[warp], "a product writes to what another still reads")
        self._check_writable(at, warp)
        self._cells[at] = sums
        self._writer[at] = self._start + warp
        self._summed[at] = self._shapes[shape] = self.number

    @property
    def number(self) -> int:
        """That of the products since the last commit."""
        return self._committed + 1

    def commit(self, address: int, phase: int) -> None:
        """Products so far are done when this phase of this mbarrier is complete."""
        self._committed += 1
        self._phases[address, phase] = self._committed

    def see(self, warps: np.ndarray, address: int, phase: int) -> None:
        """These warps have seen it complete."""
        number = self._phases.get((address, phase), 0)
        self._seen[warps] = np.maximum(self._seen[warps], number)

    def pass_barrier(self) -> None:
        """Every warp knows what any has seen."""
        self._start += 64
        self._seen[:] = self._seen.max(initial=0)

    def finish(self) -> None:
        if self._allocated.any():
            raise Fault("tensor memory was never freed")
        if self._summed.max() > self._seen.min():
            raise Fault("a product was never waited for")

    def _find(self, lanes: np.ndarray, columns: np.ndarray) -> tuple:
        fine = (lanes >= 0) & (lanes < LANES) & (columns >= 0) & (columns < COLUMNS)
        check(fine, "tensor memory address is out of bounds")
        check(self._allocated[columns], "tensor memory is touched that is not allocated")
        return lanes, columns

    def _check_readable(self, at: tuple, warp: int) -> None:
        writer = self._writer[at]
        check(writer >= 0, "tensor memory is read and was never written")
        check(~self._storing[at], "tensor memory is read before the wait for a store")
        check(
            self._is_ordered(at, warp),
            "tensor memory is read that another warp wrote since the last barrier",
        )

    def _check_writable(self, at: tuple, warp: int) -> None:
        check(~self._storing[at], "tensor memory is written before the wait for a store")
        check(~self._loading[at], "tensor memory is written before the wait for a load")
        fine = (self._reader[at] < self._start) | (self._reader[at] == self._start + warp)
        check(fine, "tensor memory is written that another warp read since the last barrier")
        check(
            self._is_ordered(at, warp),
            "two warps write to one place of tensor memory without a barrier",
        )

    def _is_ordered(self, at: tuple, warp: int) -> np.ndarray:
        """Whether the last write of these cells comes before what the warp does now."""
        writer, product = self._writer[at], self._summed[at]
        seen = (product > 0) & (product <= self._seen[warp])
        return (writer < self._start) | (writer == self._start + warp) | seen

    def _end(self, flags: np.ndarray, tags: np.ndarray, warp: int) -> None:
        flags &= (tags & 63) != warp
