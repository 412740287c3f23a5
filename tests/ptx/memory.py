"""Global and shared memory, and every rule that an access to them must keep.

Accesses of `size` bytes are aligned to `size`, so a memory is seen as rows of `size` bytes and an
access is a row. Beside the bytes stands, byte by byte, what the checks need to know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from tests.ptx.faults import check

GLOBAL_BASE = 0x7F3A_0000_0000
_GAP = 1 << 16
_ALIGNED = 256
"""XLA's arrays begin at multiples of it."""
_ROW = 16
SHARED_BASE = 1024
"""The first KiB of a block's shared memory is the system's."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a large array of which the rest is not there: `data` begins at byte `start`."""

    data: np.ndarray
    start: int = 0


class Global:
    """Arrays, each with a gap around it that nobody may touch.

    Outputs that are `updated` are an input's own memory. Blocks run in any order, so that what one
    block writes there no other may touch.
    """

    def __init__(
        self,
        inputs: Sequence[Part],
        outputs: Sequence[Part],
        updated: Mapping[int, int] | None = None,
    ):
        """`updated`: numbers of outputs, and of the inputs that they are kept in."""
        self._at = _GAP
        self._parts = [(part, self._reserve(part)) for part in inputs]
        for number, part in enumerate(outputs):
            shared = (updated or {}).get(number)
            self._parts.append(
                (part, self._reserve(part)) if shared is None else self._parts[shared]
            )
        self._bytes = np.zeros(self._at, np.uint8)
        self._readable, self._writable, self._written = np.zeros((3, self._at), np.bool_)
        self._block, self._touched = 1, np.zeros((2, self._at if updated else 0), np.int32)
        for number, (part, at) in enumerate(self._parts):
            content = np.ascontiguousarray(part.data).reshape(-1).view(np.uint8)
            place = slice(at, at + content.size)
            self._bytes[place] = content
            self._readable[place] |= number < len(inputs)
            self._writable[place] |= number >= len(inputs)

    def start(self, block: int) -> None:
        """Say who reads and writes from now on."""
        self._block = block + 1

    def _reserve(self, part: Part) -> int:
        at = self._at + part.start % _ALIGNED
        end = at + part.data.nbytes + _GAP
        self._at = end + -end % _ALIGNED
        return at

    def find(self, number: int) -> int:
        """The address of the first byte of an array, whether that byte is there or not."""
        part, at = self._parts[number]
        return GLOBAL_BASE + at - part.start

    def fetch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """An array as it is now, and which bytes of it were written."""
        part, at = self._parts[number]
        place = slice(at, at + part.data.nbytes)
        found = self._bytes[place].view(part.data.dtype).reshape(part.data.shape)
        return found, self._written[place]

    def read(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """uint8 [n, size]."""
        rows = self._find_rows(addresses, size)
        readable = _rows(self._readable, size)[rows]
        check(readable, "global memory is read out of bounds or before it is written")
        self._touch(rows, size, writes=False)
        return _rows(self._bytes, size)[rows]

    def read_some(self, addresses: np.ndarray, size: int, counts: np.ndarray) -> np.ndarray:
        """uint8 [n, size]: `counts` bytes of each, then zeros."""
        there = np.flatnonzero(counts)
        check(counts[there] == size, "a copy of part of its bytes")
        data = np.zeros((len(addresses), size), np.uint8)
        data[there] = self.read(addresses[there], size)
        return data

    def write(self, addresses: np.ndarray, data: np.ndarray) -> None:
        """Store uint8 [n, size]. What two threads store in one place must be equal."""
        size = data.shape[1]
        rows = self._find_rows(addresses, size)
        check(_rows(self._writable, size)[rows], "global memory is written out of bounds")
        memory, written = _rows(self._bytes, size), _rows(self._written, size)
        fine = ~written[rows] | (memory[rows] == data)
        memory[rows] = data
        written[rows] = _rows(self._readable, size)[rows] = True
        check(fine & (memory[rows] == data), "two values are stored in one place of global memory")
        self._touch(rows, size, writes=True)

    def _touch(self, rows: np.ndarray, size: int, *, writes: bool) -> None:
        """Note which block reads or writes what is updated in place: its number, -1 for several."""
        if not self._touched.size:
            return
        readers, writers = (_rows(touched, size) for touched in self._touched)
        others = [writers[rows], readers[rows]] if writes else [writers[rows]]
        alone = [(by == 0) | (by == self._block) for by in others]
        check(np.logical_and.reduce(alone), "what one block writes, another one touches")
        mine = writers if writes else readers
        mine[rows] = np.where((mine[rows] == 0) | (mine[rows] == self._block), self._block, -1)

    def _find_rows(self, addresses: np.ndarray, size: int) -> np.ndarray:
        offsets = addresses.astype(np.int64) - GLOBAL_BASE
        check(offsets % size == 0, f"global address is not aligned to {size} bytes")
        fine = (offsets >= 0) & (offsets + size <= self._bytes.size)
        check(fine, "global address is out of bounds")
        return offsets // size


class Shared:
    """The shared memory of one block.

    Between two barriers, bytes that a warp writes are touched by no other warp, and bytes that a
    warp reads are written by no other, but for the same value written twice. Threads of one warp
    count as one: they run in step here.

    Attributes:
      epoch: how many barriers the block has passed.
    """

    def __init__(self, size: int, warps: np.ndarray, seen: np.ndarray):
        """`size`: up to the last address; `warps`: of each thread; `seen`: see `TensorMemory`."""
        self.size = size
        size += -size % _ROW
        self.data = np.zeros(size, np.uint8)
        self.epoch = 0
        self._tags = warps.astype(np.int64)
        self._seen = seen
        self._writer = np.full(size, -1, np.int64)
        """epoch * 64 + warp of the last write; -1 before the first."""
        self._reader = np.full(size, -1, np.int64)
        """The same of reads; warp 63 stands for several."""
        self._arriving = np.zeros(size, np.bool_)
        self._unfenced = np.zeros(size, np.bool_)
        self._reading = np.zeros(size, np.int16)
        self._product = np.zeros(size, np.int32)
        """Number of the last product of `tcgen05` that reads it."""

    def read(self, addresses: np.ndarray, size: int, threads: np.ndarray | slice) -> np.ndarray:
        """uint8 [n, size]."""
        rows = self._find_rows(addresses, size)
        tags, start = self._find_tags(threads)
        writer = _rows(self._writer, size)[rows]
        self._check_read(rows, size, writer)
        fine = (writer < start) | (writer == tags)
        check(fine, "shared memory is read that another warp wrote since the last barrier")
        reader = _rows(self._reader, size)
        seen = reader[rows]
        mark = np.where((seen < start) | (seen == tags), tags, start + 63)
        reader[rows] = mark
        # of two warps that read one place at once, one mark is lost
        if not np.array_equal(now := reader[rows], mark):
            reader[rows[(now != mark).any(1)]] = start + 63
        return _rows(self.data, size)[rows]

    def write(self, addresses: np.ndarray, data: np.ndarray, threads: np.ndarray | slice) -> None:
        """Store uint8 [n, size]."""
        rows = self._store(addresses, data, threads)
        self._mark_written(rows, data.shape[1], threads)

    def start_copy(
        self, addresses: np.ndarray, data: np.ndarray, threads: np.ndarray
    ) -> np.ndarray:
        """Store what nobody may touch before `end_copy`, which takes the result."""
        rows = self._store(addresses, data, threads)
        _rows(self._arriving, data.shape[1])[rows] = True
        return rows

    def end_copy(self, rows: np.ndarray, size: int, threads: np.ndarray) -> None:
        """The threads that copied have waited, and only they may read."""
        _rows(self._arriving, size)[rows] = False
        self._mark_written(rows, size, threads)

    def fence(self, warps: np.ndarray) -> None:
        """Show the asynchronous proxy what these warps wrote, and all that was written before the
        last barrier.
        """
        mine = (self._writer < 64 * self.epoch) | np.isin(self._writer & 63, warps)
        self._unfenced &= ~mine

    def read_async(self, addresses: np.ndarray, size: int, warp: int) -> tuple:
        """uint8 [n, size] as the tensor cores read it for one warp (or several, -1), and a token.

        Until the token is given to `end_read`, these bytes may not be written.
        """
        rows = self._find_rows(addresses, size)
        writer = _rows(self._writer, size)[rows]
        self._check_read(rows, size, writer)
        fine = (writer < 64 * self.epoch) | (writer == 64 * self.epoch + warp)
        check(fine, "tensor cores read what was written since the last barrier")
        fine = ~_rows(self._unfenced, size)[rows]
        check(fine, "tensor cores read what no fence made visible to them")
        token = np.unique(rows), size
        _rows(self._reading, size)[token[0]] += 1
        return _rows(self.data, size)[rows], token

    def end_read(self, rows: np.ndarray, size: int) -> None:
        """The tensor cores are done; what they read counts as read by several warps until then."""
        _rows(self._reading, size)[rows] -= 1
        _rows(self._reader, size)[rows] = 64 * self.epoch + 63

    def hand_to_product(self, rows: np.ndarray, size: int, number: int) -> None:
        """The same, but only for warps that have seen this product done."""
        _rows(self._reading, size)[rows] -= 1
        _rows(self._product, size)[rows] = number

    def is_busy(self) -> bool:
        """Whether a copy into it was never waited for."""
        return bool(self._arriving.any())

    def _check_read(self, rows: np.ndarray, size: int, writer: np.ndarray) -> None:
        check(
            ~_rows(self._arriving, size)[rows], "shared memory is read before the wait for a copy"
        )
        check(writer >= 0, "shared memory is read and was never written")

    def _store(self, addresses: np.ndarray, data: np.ndarray, threads) -> np.ndarray:
        size = data.shape[1]
        rows = self._find_rows(addresses, size)
        tags, start = self._find_tags(threads)
        memory = _rows(self.data, size)
        fine = ~_rows(self._arriving, size)[rows]
        check(fine, "shared memory is written before the wait for a copy")
        done = _rows(self._product, size)[rows] <= self._seen[self._tags[threads]][:, None]
        fine = done & (_rows(self._reading, size)[rows] == 0)
        check(fine, "shared memory is written while tensor cores read it")
        writer, reader = _rows(self._writer, size)[rows], _rows(self._reader, size)[rows]
        fine = (writer < start) | (writer == tags) | (memory[rows] == data)
        check(fine, "two warps write to one place of shared memory without a barrier")
        fine = (reader < start) | (reader == tags)
        check(fine, "shared memory is written that another warp read since the last barrier")
        memory[rows] = data
        fine = memory[rows] == data
        check(fine, "two threads write different values to one place of shared memory")
        return rows

    def _mark_written(self, rows: np.ndarray, size: int, threads) -> None:
        _rows(self._writer, size)[rows] = self._find_tags(threads)[0]
        _rows(self._unfenced, size)[rows] = True

    def _find_tags(self, threads) -> tuple[np.ndarray, int]:
        start = 64 * self.epoch
        return (self._tags[threads] + start)[:, None], start

    def _find_rows(self, addresses: np.ndarray, size: int) -> np.ndarray:
        offsets = addresses.astype(np.int64)
        check(offsets % size == 0, f"shared address is not aligned to {size} bytes")
        fine = (offsets >= SHARED_BASE) & (offsets + size <= self.size)
        check(fine, "shared address is out of bounds")
        return offsets // size


def _rows(memory: np.ndarray, size: int) -> np.ndarray:
    return memory[: memory.size - memory.size % size].reshape(-1, size)
