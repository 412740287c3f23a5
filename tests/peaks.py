"""Peaks of resident memory, also of a process whose peak is counted anew in the meantime.

Linux counts one peak a process. A test that wants its own has it begin anew, and the kernel then
forgets the larger one before, so that it is kept here.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_RU_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024
_own = _started = 0


def begin_peak() -> int:
    """Let the peak of this process begin anew (Linux alone); its resident bytes now."""
    global _own
    _own = read_peak()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return read_status("VmRSS")


def read_status(field: str) -> int:
    """Bytes that Linux says of this process: VmRSS are resident, VmHWM were since `begin_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def note_started(peak: int) -> None:
    """A process that this one has started says that it took `peak` bytes."""
    global _started
    _started = max(_started, peak)


def read_peak() -> int:
    """The largest resident bytes that this process ever had."""
    return max(_own, _read_maximum(resource.RUSAGE_SELF))


def read_started_peak() -> int:
    """The same of the largest process that it started, of those that have ended or have said so."""
    return max(_started, _read_maximum(resource.RUSAGE_CHILDREN))


def _read_maximum(whose: int) -> int:
    return resource.getrusage(whose).ru_maxrss * _RU_MAXRSS_UNIT
