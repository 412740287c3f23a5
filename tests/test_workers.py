"""Workers that hold much are replaced while others run, and every test still runs once."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import memory

_TESTS = 3
_CONFTEST = """
import os
from pathlib import Path

import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    ran = Path(item.config.rootpath, f"{os.getpid()}.ran")
    if call.when == "call":
        with ran.open("a") as file:
            print(item.nodeid, file=file)
    report.kept_mb = 100 * len(ran.read_text().split()) if ran.exists() else 0
    return report
"""
"""Every test leaves 100 MB."""
_TEST = f"""
import pytest

@pytest.mark.parametrize("part", range({_TESTS}))
def test_part(part):
    assert (part, __name__[-2:]) != (2, "_3")
"""
"""One fails, which is no reason to end."""


def run(folder: Path, workers: int, files: int, limit: int) -> list[list[str]]:
    """What each worker ran, in its order."""
    (folder / "conftest.py").write_text(_CONFTEST)
    for i in range(files):
        (folder / f"test_{i}.py").write_text(_TEST)
    options = f"-n {workers} --dist loadfile --replace-above {limit} -p tests.workers"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", f"--rootdir={folder}", *options.split(), str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    last = ran.stdout.splitlines()[-1]
    assert f"1 failed, {files * _TESTS - 1} passed" in last, ran.stdout + ran.stderr
    return [file.read_text().split() for file in folder.glob("*.ran")]


@pytest.mark.parametrize(("workers", "files"), [(1, 5), (2, 12)])
def test_a_worker_that_holds_too_much_ends_with_the_files_it_has(workers, files, tmp_path):
    each = run(tmp_path, workers, files, 150)
    assert max(map(len, each)) <= 3 * _TESTS
    counts = collections.Counter(test for tests in each for test in tests)
    assert len(counts) == files * _TESTS
    assert set(counts.values()) == {1}


def test_workers_that_hold_little_stay(tmp_path):
    assert len(run(tmp_path, 2, 4, 100 * 4 * _TESTS)) == 2


def finish(wrapper: Generator, outcome: Any) -> Any:
    """What a hook's wrapper makes of an outcome."""
    next(wrapper)
    with pytest.raises(StopIteration) as ended:
        wrapper.send(outcome)
    return ended.value.value


def test_a_report_says_what_the_file_before_left(monkeypatch):
    monkeypatch.setattr(memory, "_resident_mb", 0)
    monkeypatch.setattr(memory, "_kept_mb", 0)
    monkeypatch.setattr(memory, "_read_resident_mb", lambda: 321)
    for next_path in (1, 2):
        assert memory._kept_mb == 0
        items = SimpleNamespace(path=1), SimpleNamespace(path=next_path)
        finish(memory.pytest_runtest_protocol(*items), True)
    report = finish(memory.pytest_runtest_makereport(None), SimpleNamespace())
    assert report.kept_mb == 321
