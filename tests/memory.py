"""The memory that test processes take: how many of them fit, what they give back, and the peaks.

A pytest plugin. Compiled programs are what fills a worker, and JAX keeps them as long as their
functions live, so that they are dropped after each file.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator

import jax
import psutil
import pytest

from tests.peaks import read_peak, read_started_peak

LIMIT_MB = 1500
"""What a test process may take, in units of 2^20 bytes."""

_STEP_MB = 120
"""What a file's tests may add before memory is given back between them."""

_PEAKS = "peaks_mb"
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h
_peaks: list[tuple[int, int, str]] = []
_resident_mb = LIMIT_MB // 2
_kept_mb = 0
_highest: tuple[int, str] = 0, ""
"""The peak so far, and the test that raised it."""

if sys.platform == "linux":
    # Arrays from 1 MB on go back when they are freed; glibc's own bound rises to 32 MB as they are
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--hold-memory",
        action="store_true",
        help=f"fail where a test process took more than {LIMIT_MB} MB",
    )


def pytest_xdist_auto_num_workers() -> int:
    """As many workers as there are cores, of those that fit into memory together, and 8 at most."""
    return max(1, min(os.cpu_count() or 1, _read_available_mb() // LIMIT_MB, 8))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Let no collection look again at modules and tests: they are many, and live until the end."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Give memory back after the last test of each file, and within large ones."""
    global _resident_mb, _kept_mb, _highest
    outcome = yield
    if (peak := read_peak() >> 20) > _highest[0]:
        _highest = peak, item.nodeid.partition("[")[0]
    is_last = nextitem is None or nextitem.path != item.path
    if is_last or _read_resident_mb() > _resident_mb + _STEP_MB:
        _give_back()
        _resident_mb = _read_resident_mb()
    if is_last:
        _kept_mb = _resident_mb
    return outcome


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Say what the file before left, for which `tests.workers` replaces this process."""
    report = yield
    report.kept_mb = _kept_mb
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the peaks of this process and of the largest that it started to the controller."""
    mine = read_peak() >> 20, read_started_peak() >> 20, _highest[1]
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_PEAKS] = mine
    elif not session.config.pluginmanager.hasplugin("dsession"):
        _peaks.append(mine)
    worst = max((max(own, started) for own, started, _ in _peaks), default=0)
    if session.config.getoption("--hold-memory") and worst > LIMIT_MB:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    output = getattr(node, "workeroutput", {})
    if _PEAKS in output:
        _peaks.append(tuple(output[_PEAKS]))


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the peak of every worker, and of the largest process that its tests started."""
    for worker, (own, started, where) in enumerate(_peaks):
        mark = f" (the limit is {LIMIT_MB} MB)" if max(own, started) > LIMIT_MB else ""
        terminalreporter.write_line(
            f"peak memory of worker {worker}: {own} MB{mark}, in {where}; "
            f"of processes it started: {started} MB"
        )


def _give_back() -> None:
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":  # glibc keeps what is freed
        ctypes.CDLL(None).malloc_trim(0)


def _read_resident_mb() -> int:
    return psutil.Process().memory_info().rss >> 20


def _read_available_mb() -> int:
    return psutil.virtual_memory().available >> 20
