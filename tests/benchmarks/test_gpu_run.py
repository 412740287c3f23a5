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


def test_a_step_that_takes_too_long_is_asked_to_end_and_says_how_far_it_came(monkeypatch):
    monkeypatch.setattr(gpu_run, "_LEAST_SECONDS", 2)
    script = (
        "import signal, time\n"
        # a job in the background of a shell inherits that SIGINT is ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('started', flush=True)\n"
        "try: time.sleep(600)\n"
        "except KeyboardInterrupt: print('3 of 7 failed')\n"
    )
    step = run_step("tests", ["-c", script], 2.0)
    assert (step.exit_code, step.tail) == (None, ["started", "3 of 7 failed"])


def test_a_step_that_hangs_is_stopped_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "_INTERRUPT_SECONDS", 1)
    note = tmp_path / "child"
    script = (
        "import pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
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


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Steps that take no time; each command is recorded, and the tuner leaves a table."""
    commands = {}
    table = tmp_path / "tiles" / "a-gpu.json"

    def pretend(name, arguments, seconds, environment=None):
        commands[name] = (arguments, seconds, environment)
        if name == "tune":
            table.write_text("{}")
        code = {"tests": 1, "tune moe": None, "models, graph loop": -11}.get(name, 0)
        return gpu_run.Step(name, arguments, 2.0, code, [str(table)] if name == "table" else [])

    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("JAXWNA16_TILES", str(tmp_path / "tiles"))
    monkeypatch.setattr(gpu_run, "run_step", pretend)
    return commands


def read_report(tmp_path, stage):
    return json.loads((tmp_path / "out" / f"run-{stage}.json").read_text())


def test_every_step_runs_and_the_summary_says_how_each_went(tmp_path, pretended, capsys):
    assert gpu_run.main([]) == 1
    assert list(pretended) == [
        *("tests", "bench", "bench moe", "table", "tune", "tune moe"),
        *("bench again", "bench moe again", "models", "models, graph loop"),
    ]
    for name, (arguments, _, _) in pretended.items():
        assert ("--moe" in arguments) == ("moe" in name)
        assert ("--tune" in arguments) == ("tune" in name)
        assert ("--peers" in arguments) == (name in ("bench", "bench moe"))
    steps = read_report(tmp_path, "measure")["steps"]
    assert [step["exit_code"] for step in steps] == [1, 0, 0]
    steps = read_report(tmp_path, "tune")["steps"]
    assert [step["exit_code"] for step in steps] == [0, 0, None]
    out = capsys.readouterr().out
    assert "tests: failed (1), 2 s" in out
    assert "tune moe: took too long" in out
    assert "bench moe again: good" in out


def test_a_crash_with_the_loop_in_a_graph_is_recorded_and_is_no_failure(
    tmp_path, pretended, capsys
):
    (tmp_path / "tiles").mkdir()
    assert gpu_run.main(["models"]) == 0
    arguments, seconds, _ = pretended["models, graph loop"]
    assert "--graph-loop" in arguments and "--graph-loop" not in pretended["models"][0]
    # most of the time is for what must be measured
    assert pretended["models"][1] > 2 * gpu_run.STAGE_SECONDS["models"] / 3 > 0
    assert seconds > 0
    last = read_report(tmp_path, "models")["steps"][-1]
    assert (last["name"], last["exit_code"]) == ("models, graph loop", -11)
    assert last["is_attempt"]
    assert "models, graph loop: failed (-11)" in capsys.readouterr().out


def test_figures_with_tuned_tiles_are_kept_beside_those_without(tmp_path, pretended):
    gpu_run.main([])
    folder = tmp_path / "out"
    tiles = {"JAXWNA16_TILES": str(tmp_path / "tiles")}
    for name, (arguments, _, environment) in pretended.items():
        # a table that the caller names is everybody's; only these need one
        own = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} if name == "tests" else None
        assert environment == (own if name in ("tests", "bench", "bench moe") else tiles)
        if name not in ("tests", "table"):
            place = folder / "tuned" if "again" in name else folder
            place = folder / "graph-loop" if "graph loop" in name else place
            assert arguments[arguments.index("--output") + 1] == str(place)
    assert (folder / "a-gpu.json").exists()
    assert read_report(tmp_path, "measure")["table"] is None
    assert read_report(tmp_path, "again")["table"] == str(tmp_path / "tiles" / "a-gpu.json")


@pytest.mark.parametrize("stage", ["again", "models"])
def test_without_a_table_for_this_gpu_nothing_is_measured_as_tuned(
    stage, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("JAXWNA16_TILES", str(tmp_path))
    monkeypatch.setenv("JAXWNA16_COMMIT", "0123")
    monkeypatch.setattr(gpu_run, "find_commit", lambda: os.environ["JAXWNA16_COMMIT"])
    script = gpu_run._FIND_TABLE.replace("find_device()", "Device('a GPU', 1)")
    script = script.replace("import UNKNOWN, find_device", "import UNKNOWN, Device")
    monkeypatch.setattr(gpu_run, "_FIND_TABLE", script)
    assert gpu_run.main([stage]) == 1
    assert f"{tmp_path / 'a-gpu.json'} does not exist: run the stage tune" in capfd.readouterr().out
    report = read_report(tmp_path, stage)
    assert [step["name"] for step in report["steps"]] == ["table"]
    assert (report["table"], report["commit"]) == (None, "0123")


@pytest.mark.parametrize("stage", gpu_run.STAGE_SECONDS)
def test_a_stage_alone_takes_less_than_ten_minutes(pretended, stage):
    assert gpu_run.main([stage]) == (stage in ("measure", "tune"))
    assert gpu_run.STAGE_SECONDS[stage] <= 560
    assert sum(gpu_run.STAGE_SECONDS.values()) <= 1450
    left = gpu_run.STAGE_SECONDS[stage]
    for name, (arguments, seconds, _) in pretended.items():
        assert seconds <= left
        if "--seconds" in arguments:
            inner = int(arguments[arguments.index("--seconds") + 1])
            peers = "--peer-seconds" in arguments and int(
                arguments[arguments.index("--peer-seconds") + 1]
            )
            # what is begun may end before the step is stopped
            assert inner + peers + (60 if "moe" in name else 25) <= seconds + 1
            assert inner >= 60


def test_a_stage_that_does_not_exist_is_refused(pretended, capsys):
    with pytest.raises(SystemExit):
        gpu_run.main(["bench"])
    assert "no stage 'bench': there are measure, tune, again, models" in capsys.readouterr().err
    assert pretended == {}


@pytest.mark.parametrize(
    ("name", "target"),
    [("kernels", "W4, M=1, 8192x8192"), ("moe", "MoE decode, 2048x768 E128 k8")],
)
def test_the_summary_shows_the_targets_that_were_measured(tmp_path, capsys, name, target):
    row = {"tokens": 1, "symmetric": False, "bits": 4, "shape": "", "engines": {}, "peers": {}}
    row |= {"group_size": 128, "dtype": "bfloat16", "figures": None, "parts": {}, "bytes": 1}
    row |= {"experts_touched": 8.0} if name == "moe" else {}
    (tmp_path / f"{name}.json").write_text(json.dumps({"rows": [row]}))
    gpu_run.print_summary(tmp_path, [])
    out = capsys.readouterr().out
    assert target in out
    assert ("8192x8192" in out) == (name == "kernels")


def test_steps_use_this_python_and_no_memory_that_others_need(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    script = "import os; print(os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'], os.getcwd())"
    step = run_step("tests", ["-c", script], 60.0)
    assert step.tail == [f"false {gpu_run.ROOT}"]
    assert os.path.samefile(step.command[0], __import__("sys").executable)
