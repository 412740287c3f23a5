"""`make gpu`: a step that fails or hangs is recorded, and the next runs."""

from __future__ import annotations

import json
import os
import time

import pytest

from benchmarks import gpu_run
from benchmarks.gpu_run import run_step


def test_a_step_keeps_its_exit_code_and_last_lines(capfd):
    step = run_step("tests", ["-c", "print('a'); print('b'); raise SystemExit(3)"], 60.0)
    assert (step.exit_code, step.tail) == (3, ["a", "b"])
    assert "a\nb" in capfd.readouterr().out


def test_a_step_that_hangs_is_stopped_with_what_it_started(tmp_path):
    note = tmp_path / "child"
    script = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid))\n"
        "print('started', flush=True)\n"
        "time.sleep(600)\n"
    )
    step = run_step("bench", ["-c", script], 5.0)
    assert step.exit_code is None
    assert step.tail == ["started"]
    for _ in range(50):
        if not is_running(int(note.read_text())):
            return
        time.sleep(0.1)
    pytest.fail("the process that the step had started still runs")


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_step_runs_and_the_summary_says_how_each_went(tmp_path, monkeypatch, capsys):
    commands = []

    def pretend(name, arguments, seconds, environment=None):
        commands.append((name, arguments, seconds, environment))
        code = {"tests": 1, "tune": None, "bench": 0}[name]
        return gpu_run.Step(name, arguments, 2.0, code, [])

    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu_run, "run_step", pretend)
    assert gpu_run.main() == 1
    names, arguments, seconds, environments = zip(*commands, strict=True)
    assert names == ("tests", "tune", "bench")
    assert "--tune" in arguments[1]
    assert "--peers" in arguments[2]
    # all of it, with what the last step may take, is less than 8 minutes
    assert sum(seconds[:2]) < gpu_run.TOTAL_SECONDS
    assert seconds[2] <= gpu_run.TOTAL_SECONDS < 480
    # the bench finds the table that the tuner wrote
    assert environments[1] == environments[2] == {"JAXWNA16_TILES": str(tmp_path / "out")}
    steps = json.loads((tmp_path / "out" / "run.json").read_text())["steps"]
    assert [step["exit_code"] for step in steps] == [1, None, 0]
    out = capsys.readouterr().out
    assert "tests: failed (1), 2 s" in out
    assert "tune: took too long" in out
    assert "bench: good" in out


def test_the_summary_shows_the_targets_that_were_measured(tmp_path, capsys):
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": []}))
    gpu_run.print_summary(tmp_path, [])
    assert "W4, M=1, 8192x8192" in capsys.readouterr().out


def test_steps_use_this_python_and_no_memory_that_others_need(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    script = "import os; print(os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'], os.getcwd())"
    step = run_step("tests", ["-c", script], 60.0)
    assert step.tail == [f"false {gpu_run.ROOT}"]
    assert os.path.samefile(step.command[0], __import__("sys").executable)
