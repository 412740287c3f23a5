"""Peaks are reported also where one was counted anew, and a run above the limit fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import memory, peaks

_SCRIPT = """
from tests.peaks import begin_peak, read_peak, read_status
taken = bytearray(200 << 20)
taken[::4096] = bytes([1]) * len(taken[::4096])
del taken
begin_peak()
print(read_status("VmHWM") >> 20, read_peak() >> 20)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone counts anew")
def test_a_peak_is_kept_where_another_begins():
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", _SCRIPT], cwd=root, capture_output=True, text=True, check=True
    )
    new, kept = map(int, ran.stdout.split())
    assert new < 200 <= kept


def test_what_a_started_process_says_counts(monkeypatch):
    monkeypatch.setattr(peaks, "_started", 0)
    peaks.note_started(1 << 50)
    peaks.note_started(1)
    assert peaks.read_started_peak() == 1 << 50


@pytest.mark.parametrize(("peak", "fails"), [(memory.LIMIT_MB, False), (memory.LIMIT_MB + 1, True)])
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_a_worker_or_what_it_started_above_the_limit_fails_the_run(
    monkeypatch, peak, fails, held, own
):
    """As on the controller, to which the workers have said their peaks."""
    monkeypatch.setattr(memory, "_peaks", [(1, 1, "")])
    said = {"peaks_mb": (peak, 1, "") if own else (1, peak, "")}
    memory.pytest_testnodedown(SimpleNamespace(workeroutput=said), None)
    plugins = SimpleNamespace(hasplugin=lambda name: name == "dsession")
    config = SimpleNamespace(getoption=lambda name: held, pluginmanager=plugins)
    session = SimpleNamespace(config=config, exitstatus=pytest.ExitCode.OK)
    memory.pytest_sessionfinish(session)
    assert (session.exitstatus == pytest.ExitCode.TESTS_FAILED) == (fails and held)
