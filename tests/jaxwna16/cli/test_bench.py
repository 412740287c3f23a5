"""`jaxwna16 bench` on a machine without a GPU: what it refuses, and the CPU path end to end."""

from __future__ import annotations

import json

import jax
import pytest

from jaxwna16.bench import run as running
from jaxwna16.bench import tune, tune_ahead
from jaxwna16.cli import bench
from jaxwna16.cli.main import main
from pallas_kernels.tiles import device
from pallas_kernels.tiles import tables as tile_tables

CALL = ["bench", "--cpu", "--group-size", "32"]


def test_without_a_gpu_it_says_so_and_the_call_is_at_fault(call):
    outcome = call("bench")
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: JAX sees no GPU, only cpu: there is no kernel to time.")
    assert "--cpu" in outcome.err


def test_the_refusal_is_json_too(call):
    outcome = call("bench", "--json")
    assert outcome.code == 2
    assert outcome.report["error"]["message"].startswith("JAX sees no GPU")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--tune"], "--tune times kernels that run on an NVIDIA GPU"),
        (["--cpu", "--table", "t.json"], "add --tune"),
        (["--cpu", "--seconds", "0"], "--seconds must be above 0"),
        (["--cpu", "--peer-seconds", "-3"], "--peer-seconds must be above 0"),
        (["--cpu", "--bits", "3"], "--bits must be 4, 8 or 4,8, got 3"),
        (["--cpu", "--shapes", "12"], "neither KxN"),
        (["--cpu", "--tokens", "0"], "positive integers"),
        (["--cpu", "--group-size", "x"], "channel"),
        (["--cpu", "--dtype", "float32"], "invalid choice"),
        (["--cpu", "--moe", "64x32"], "neither HxIxExtop_k"),
        (["--cpu", "--moe", "64x32x2x4"], "a token cannot choose 4 of 2 experts"),
        (["--cpu", "--moe", "--shapes", "64x64"], "--shapes times linear layers"),
        (["--cpu", "--step", "gpt"], "no model 'gpt'"),
        (["--cpu", "--step", "--moe"], "give no --shapes, --moe or --tune with it"),
        (["--cpu", "--slots", "64"], "add --step"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_call_is_exit_code_2_with_the_reason(call, argv, says):
    outcome = call("bench", *argv)
    assert outcome.code == 2
    assert says in outcome.err


def test_with_a_gpu_the_cpu_is_not_timed_by_mistake(call, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    outcome = call("bench", "--cpu")
    assert outcome.code == 2
    assert "for machines without a GPU" in outcome.err


def test_a_group_that_does_not_fit_names_the_shape(call):
    outcome = call(*CALL, "--shapes", "64x64,100x64")
    assert outcome.code == 1
    assert "shape 100x64: QuantSpec.group_size must divide in_features = 100" in outcome.err


def test_the_cpu_path_is_timed_and_written(call, tmp_path):
    folder = tmp_path / "results"
    shapes = ["--shapes", "64x64,64x128", "--tokens", "3", "--bits", "4"]
    outcome = call(*CALL, *shapes, "--symmetric", "--asymmetric", "--output", folder, "--json")
    assert outcome.code == 0
    report = outcome.report
    cases = [(r["out_features"], r["bits"], r["symmetric"], r["tokens"]) for r in report["rows"]]
    assert sorted(cases) == [(n, 4, symmetric, 3) for n in (64, 128) for symmetric in (False, True)]
    assert all(row["figures"]["bandwidth_share"] > 0 for row in report["rows"])
    assert report["machine"]["device"] == {"platform": "cpu", "kind": "cpu"}
    assert report["options"]["shapes"] == ["64x64", "64x128"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "kernels.json",
        "kernels.md",
        "kernels.png",
    ]
    written = json.loads((folder / "kernels.json").read_text())
    assert written["rows"] == report["rows"]


def test_experts_are_timed_and_written_beside_linear_layers(call, tmp_path):
    experts = ["--moe", "64x32x4x2", "--tokens", "3", "--output", tmp_path]
    outcome = call(*CALL, *experts, "--json")
    assert outcome.code == 0
    [row] = outcome.report["rows"]
    assert (row["shape"], row["tokens"]) == ("64x32 E4 k2", 3)
    assert row["figures"]["bandwidth_share"] > 0
    assert row["parts"]["grouping"]["share"] > 0
    assert outcome.report["options"]["moe"] == ["64x32 E4 k2"]
    assert outcome.report["problems"] == []
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["moe.json", "moe.md", "moe.png"]


def test_a_step_is_timed_and_written_beside_them(call, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxwna16.bench.step_cases.OPERATIONS", ("attention", "add_norm"))
    outcome = call("bench", "--cpu", "--step", "--slots", "16", "--output", tmp_path, "--json")
    assert outcome.code == 0
    rows = outcome.report["rows"]
    assert [row["shape"] for row in rows] == ["attention tiny C=16", "add_norm tiny C=16"]
    assert all(row["figures"]["bandwidth_share"] > 0 for row in rows)
    assert outcome.report["options"]["step"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.json", "step.md", "step.png"]
    written = (tmp_path / "step.md").read_text()
    assert "## Targets" not in written
    assert "half of the C slots are seen" in written


def test_a_group_that_does_not_fit_experts_names_them(call):
    outcome = call("bench", "--cpu", "--moe", "64x48x4x2", "--group-size", "32")
    assert outcome.code == 1
    assert "experts 64x48 E4 k2: QuantSpec.group_size must divide in_features = 48" in outcome.err


@pytest.mark.parametrize(("tuning", "cases"), [([], 4 * 13 + 2 * 3), (["--tune"], 4 * 13 + 3)])
def test_the_default_plan_of_experts_has_four_models(monkeypatch, tuning, cases):
    seen = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for name in ("_bench", "_tune"):
        monkeypatch.setattr(bench, name, lambda args, cases, *_: seen.extend(cases) or [])
    assert main(["bench", "--moe", *tuning, "--json"]) == 0
    assert len(seen) == cases
    assert {case.kind for case in seen} == {"moe"}
    roles = list(dict.fromkeys(case.role.split(" ")[0] for case in seen))
    assert roles == ["Qwen3-30B-A3B", "Mixtral-8x7B", "Qwen3.5-122B-A10B", "DeepSeek-V3"]
    assert {case.tokens for case in seen} == {1 << i for i in range(13)}
    labels = [case.label for case in seen]
    assert "2048x768 E128 k8 T=16 W8 g128 asymmetric bfloat16" in labels
    assert ("2048x768 E128 k8 T=16 W4 g128 symmetric bfloat16" in labels) == (not tuning)


def test_without_names_a_cpu_times_small_experts(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "_bench", lambda args, cases, *_: seen.extend(cases) or [])
    assert main(["bench", "--cpu", "--moe", "--json"]) == 0
    assert [case.shape for case in seen] == ["512x256 E16 k4"] * 2


def test_people_get_a_table_and_no_targets_from_a_cpu(call):
    outcome = call(*CALL, "--shapes", "64x64", "--tokens", "1")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].startswith("cpu, jax ")
    assert lines[1].split()[:2] == ["shape", "tokens"]
    assert lines[2].startswith("64x64")
    assert "Marlin" not in outcome.out


def test_a_failed_case_of_ours_is_exit_code_1_with_the_report(call, monkeypatch):
    def fail(engine, case, figure, effort):
        raise RuntimeError(f"cannot compile {engine.name}")

    monkeypatch.setattr(running, "compile_program", fail)
    outcome = call(*CALL, "--shapes", "64x64", "--tokens", "1", "--json")
    assert outcome.code == 1
    assert outcome.report["rows"][0]["figures"] is None
    assert "ours: RuntimeError: cannot compile ours (1 of the cases)" in outcome.report["problems"]


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_timed(call, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = call(*CALL, "--output", tmp_path / "file" / "results")
    assert outcome.code == 1
    assert "cannot write results there" in outcome.err


@pytest.mark.parametrize("trouble", ["no matplotlib", "in matplotlib"])
def test_a_plot_that_cannot_be_drawn_is_a_problem_beside_the_figures(
    call, monkeypatch, tmp_path, trouble
):
    if trouble == "in matplotlib":
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    else:
        monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    call_ = [*CALL, "--shapes", "64x64", "--tokens", "1", "--output", tmp_path, "--json"]
    outcome = call(*call_)
    assert outcome.code == 0
    [problem] = [line for line in outcome.report["problems"] if line.startswith("no plot: ")]
    assert ("division by zero" in problem) == (trouble == "in matplotlib")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json", "kernels.md"]
    assert problem in json.loads((tmp_path / "kernels.json").read_text())["problems"]


def test_whoever_is_stopped_has_the_figures_of_the_weights_before(call, monkeypatch, tmp_path):
    compile_program = running.compile_program

    def stop_at_the_second(engine, case, figure, effort):
        if case.shape == "64x128":
            raise KeyboardInterrupt
        return compile_program(engine, case, figure, effort)

    monkeypatch.setattr(running, "compile_program", stop_at_the_second)
    shapes = ["--shapes", "64x64,64x128", "--tokens", "1"]
    assert call(*CALL, *shapes, "--output", tmp_path).code == 130
    [row] = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert row["shape"] == "64x64"
    assert row["figures"]["bandwidth_share"] > 0


def test_numbers_of_tokens_leave_what_the_targets_compare_with(monkeypatch):
    seen = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(bench, "_bench", lambda args, cases, *_: seen.extend(cases) or [])
    assert main(["bench", "--tokens", "1,4096", "--json"]) == 0
    assert len(seen) == 12 * 2 + 2 * 1


def test_the_default_plan_has_every_shape_and_what_the_targets_compare_with(monkeypatch):
    seen = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(bench, "_bench", lambda args, cases, *_: seen.extend(cases) or [])
    assert main(["bench", "--json"]) == 0
    assert len(seen) == 12 * 13 + 2 * 3
    twins = [case.label for case in seen if case.spec.symmetric or case.spec.bits == 8]
    assert "8192x8192 M=1 W8 g128 asymmetric bfloat16" in twins
    assert "8192x8192 M=1 W4 g128 symmetric bfloat16" in twins
    weights = list(dict.fromkeys(case.spec for case in seen))
    assert [case.spec for case in seen] == sorted((case.spec for case in seen), key=weights.index)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A GPU whose trials all take as long as the candidate is far down the list, the last none."""

    class Trials:
        def __init__(self, deadline):
            pass

        def __call__(self, case, candidates):
            timed = [tune.Trial(s, 1e-5 * (9 + i)) for i, s in enumerate(candidates[:-1])]
            return [*timed[:1], tune.Trial(candidates[-1], 1e-5), *timed[1:]]

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(device, "find_device", lambda: device.Device("an invented GPU", 132))
    monkeypatch.setattr(tune, "Workbench", Trials)
    # the more is read ahead, the faster is a layer, up to 8 MiB
    monkeypatch.setattr(tune_ahead, "time_layer", lambda size: 1e-4 + abs(size - (8 << 20)) * 1e-12)


TUNE = ["bench", "--tune", "--shapes", "4096x4096", "--tokens", "1,100"]


def test_tuning_writes_the_table_that_is_named_and_says_what_was_gained(
    call, pretended_gpu, tmp_path
):
    table = tmp_path / "tables" / "mine.json"
    outcome = call(*TUNE, "--table", table, "--output", tmp_path / "out", "--json")
    assert outcome.code == 0
    report = outcome.report
    assert report["table"] == {
        "file": str(table),
        "entries": 2,
        "cases_without_time": 0,
        "ahead": 8 << 20,
    }
    assert tile_tables.read_table(table).ahead == 8 << 20
    assert [found["tokens"] for found in report["tuned"]] == [1, 128]
    assert all(found["best_seconds"] == 1e-5 for found in report["tuned"])
    entries = tile_tables.read_table(table).entries
    assert [(entry.tokens, entry.group_size, entry.x_dtype) for entry in entries] == [
        (1, 128, "bfloat16"),
        (128, 128, "bfloat16"),
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "tuning.json",
        "tuning.md",
    ]
    lines = call(*TUNE, "--table", table).out.splitlines()
    assert lines[1].split()[:3] == ["shape", "tokens", "weight"]
    assert lines[-1] == f"2 entries in {table}"


def test_whoever_stops_the_tuner_has_the_winners_before(call, pretended_gpu, tmp_path, monkeypatch):
    time_all, table = tune.Workbench.__call__, tmp_path / "mine.json"

    def stop_at_the_second(self, case, candidates):
        if case.tokens == 128:
            raise KeyboardInterrupt
        return time_all(self, case, candidates)

    monkeypatch.setattr(tune.Workbench, "__call__", stop_at_the_second)
    assert call(*TUNE, "--table", table, "--output", tmp_path).code == 130
    assert [entry.tokens for entry in tile_tables.read_table(table).entries] == [1]
    report = json.loads((tmp_path / "tuning.json").read_text())
    assert [found["tokens"] for found in report["tuned"]] == [1]
    assert report["table"] == {
        "file": str(table),
        "entries": 1,
        "cases_without_time": 1,
        "ahead": 0,
    }


def test_experts_are_tuned_into_the_same_table(call, pretended_gpu, tmp_path):
    table = tmp_path / "mine.json"
    assert call(*TUNE, "--table", table).code == 0
    experts = ["bench", "--tune", "--moe", "qwen3-30b-a3b", "--tokens", "1,60"]
    outcome = call(*experts, "--table", table, "--output", tmp_path / "out", "--json")
    assert outcome.code == 0
    assert outcome.report["table"] == {
        "file": str(table),
        "entries": 4,
        "cases_without_time": 0,
        "ahead": 8 << 20,
    }
    assert [found["tokens"] for found in outcome.report["tuned"]] == [1, 64]
    found = tile_tables.read_table(table)
    assert len(found.entries) == 2
    assert [(entry.sizes, entry.tokens) for entry in found.experts] == [
        ((2048, 768, 128, 8), 1),
        ((2048, 768, 128, 8), 64),
    ]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["moe-tuning.json", "moe-tuning.md"]


def test_without_a_name_the_table_goes_where_it_is_looked_for(
    call, pretended_gpu, tmp_path, monkeypatch
):
    monkeypatch.setenv("JAXWNA16_TILES", str(tmp_path))
    assert call(*TUNE).code == 0
    path = tile_tables.find_table_path("an invented GPU")
    assert path is not None
    assert path.parent == tmp_path


def test_a_table_that_cannot_be_used_is_refused_before_anything_is_timed(
    call, pretended_gpu, tmp_path, monkeypatch
):
    table = tmp_path / "table.json"
    table.write_text("{")
    monkeypatch.setattr(tune, "tune_cases", None)
    outcome = call(*TUNE, "--table", table)
    assert outcome.code == 1
    assert str(table) in outcome.err
    assert table.read_text() == "{"


def test_when_no_candidate_works_the_exit_code_says_so(call, pretended_gpu, tmp_path, monkeypatch):
    class Fail:
        def __init__(self, deadline):
            pass

        def __call__(self, case, candidates):
            return [tune.Trial(s, None, "RuntimeError: spilled") for s in candidates]

    monkeypatch.setattr(tune, "Workbench", Fail)
    outcome = call(*TUNE, "--table", tmp_path / "t.json", "--json")
    assert outcome.code == 1
    assert [found["best"] for found in outcome.report["tuned"]] == [None, None]
