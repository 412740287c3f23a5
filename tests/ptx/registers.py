"""Registers: one array over the threads of a block for each.

A register that no instruction has written has no value, in all threads or in some; reading it is a
fault. So is reading one that was put together of parts, if a part has no value and is not dropped
at once. Instructions that go on in the background hold registers: until they are waited for, sums
that they write may be neither read nor written, and what they read may not be written.

Arrays are replaced, never changed, so a copy of a register is the same array.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping

import numpy as np

from tests.ptx.faults import EarlyRead, Fault
from tests.ptx.parse import Refused

RAW = {
    "pred": np.dtype(np.bool_),
    **{f"{letter}{8 * size}": np.dtype(f"u{size}") for size in (2, 4, 8) for letter in "bus"},
    "b8": np.dtype("u1"),
    "f32": np.dtype("u4"),
    "f64": np.dtype("u8"),
}
"""How the bits of each type of register are kept."""


class Registers:
    """The registers of one block."""

    def __init__(self, kinds: Mapping[str, str], threads: int, *, early: bool = False):
        """`kinds`: name -> declared type; `early`: let loads of tensor memory be read early."""
        if unknown := set(kinds.values()) - RAW.keys():
            raise Refused(f"registers of type {', '.join(sorted(unknown))}")
        self.threads = threads
        self.raw = {name: RAW[kind] for name, kind in kinds.items()}
        self.unfenced: set[str] = set()
        """Written since the last `wgmma.fence`."""
        self._values: dict[str, np.ndarray] = {}
        self._written: dict[str, np.ndarray] = {}
        """Of registers with a value in some threads only: which."""
        self._gaps: dict[str, frozenset[int]] = {}
        """Of registers with parts that have no value: the bytes of these."""
        self._early = early
        self._loaded: set[str] = set()
        self._summed: collections.Counter[str] = collections.Counter()
        self._used: collections.Counter[str] = collections.Counter()

    def read(
        self, name: str, active: np.ndarray | None, dropped: frozenset[int] = frozenset()
    ) -> np.ndarray:
        """The bits, of all threads; those of threads that are not active may be anything.

        So may those of the bytes that are `dropped`.
        """
        value = self._values.get(name)
        if value is None:
            raise Fault(f"register {name} is read and was never written")
        if self._gaps.get(name, frozenset()) - dropped:
            raise Fault(f"register {name} is read and a part of it was never written")
        if name in self._written:
            written = self._written[name]
            if not (written if active is None else written | ~active).all():
                raise Fault(f"register {name} is read by threads that never wrote it")
        if name in self._summed:
            raise Fault(f"register {name} is read before the wait for its sum")
        if name in self._loaded:
            raise EarlyRead(f"register {name} is read before the wait for its load")
        return value

    def is_empty(self, name: str) -> bool:
        """Whether no instruction has written it."""
        return name not in self._values

    def write(
        self,
        name: str,
        value: np.ndarray,
        active: np.ndarray | None,
        gaps: frozenset[int] = frozenset(),
    ) -> None:
        """Set the bits in the active threads (all, if None); the bytes `gaps` get no value."""
        if name in self._summed or name in self._used or name in self._loaded:
            raise Fault(f"register {name} is overwritten before the wait for its use")
        raw = self.raw[name]
        if value.dtype != raw:
            if value.dtype.itemsize != raw.itemsize:
                raise Refused(f"{value.dtype} for register {name}")
            value = value.view(raw)
        if value.ndim == 0:
            value = np.full(self.threads, value)
        if active is not None:
            value = self._merge(name, value, active)
            gaps |= self._gaps.get(name, frozenset())
        else:
            self._written.pop(name, None)
        self._gaps.pop(name, None)
        if gaps:
            self._gaps[name] = gaps
        self._values[name] = value
        self.unfenced.add(name)

    def _merge(self, name: str, value: np.ndarray, active: np.ndarray) -> np.ndarray:
        old = self._values.get(name)
        if old is None:
            self._written[name] = active.copy()
            return value
        if name in self._written:
            written = self._written[name] | active
            self._written[name] = written
            if written.all():
                del self._written[name]
        return np.where(active, value, old)

    def peek(self, name: str) -> np.ndarray:
        """The bits of a sum that may not be ready: the next sum of the same shape reads it."""
        if name not in self._values or name in self._written or name in self._gaps:
            raise Fault(f"register {name} is added to and was never written")
        return self._values[name]

    def poke(self, name: str, value: np.ndarray) -> None:
        """Set the bits of a sum that is not ready yet."""
        self._values[name] = value
        self._written.pop(name, None)
        self._gaps.pop(name, None)

    def hold(self, summed: Iterable[str], used: Iterable[str]) -> None:
        """Forbid to touch `summed`, and to write `used`, until they are released."""
        self._summed.update(summed)
        self._used.update(used)

    def release(self, summed: Iterable[str], used: Iterable[str]) -> None:
        """End one `hold`."""
        for count, names in ((self._summed, summed), (self._used, used)):
            for name in names:
                count[name] -= 1
                if not count[name]:
                    del count[name]

    def hold_loaded(self, names: Iterable[str]) -> None:
        """Forbid to touch what `tcgen05.ld` fills."""
        if not self._early:
            self._loaded.update(names)

    def release_loaded(self) -> None:
        self._loaded.clear()
