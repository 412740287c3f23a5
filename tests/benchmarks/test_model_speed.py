"""Whole models with random weights: the script runs, and its limit counts all bytes."""

from __future__ import annotations

import gzip
import json
import os

import jax
import pytest
from flax import nnx

from benchmarks import model_speed
from benchmarks.model_speed import SMALL, Case, count_step_bytes, list_specs, make_model
from jaxwna16.generation.decoding import trace_counts


def test_a_small_model_is_measured_traced_and_written(tmp_path, monkeypatch, capsys):
    name = "Llama-3.1-8B"
    monkeypatch.setattr(model_speed, "SMALL", {name: SMALL[name]})
    monkeypatch.setattr(model_speed, "SMALL_PREFILL", Case(2, 16, 1))
    measured, trace = [], model_speed.trace

    def watch(*facts):
        measured.append(trace_counts.copy())
        trace(*facts)
        measured.append(trace_counts.copy())

    monkeypatch.setattr(model_speed, "trace", watch)
    call = ["--small", "--rounds", "1", "--batches", "2", "--trace", "--output", str(tmp_path)]
    model_speed.main(call)
    report = json.loads((tmp_path / "models.json").read_text())
    assert list(report["models"][name]) == ["batch 2", "prefill 16"]
    decode = report["models"][name]["batch 2"]
    assert decode["share_of_limit"] == decode["limit_seconds"] / decode["step_seconds"] > 0
    assert len(decode["decode_tokens_per_second"]) == 1
    out = capsys.readouterr().out
    assert (tmp_path / "models.md").read_text() in out
    profile = f"{name}.trace.json.gz"
    assert f"{profile}: 0.00 ms of 0 kernels" in out  # on a CPU
    # what is recorded was compiled before
    assert measured[0] == measured[1]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [profile, "models.json", "models.md"]


def test_the_loop_over_tokens_is_put_into_the_graph_for_one_model_if_asked(
    tmp_path, monkeypatch, capsys
):
    flags = []
    monkeypatch.setenv("XLA_FLAGS", "--xla_before=1")
    monkeypatch.setattr(model_speed, "make_model", lambda shape: None)
    row = {"prefill_tokens_per_second": [1.0]}
    monkeypatch.setattr(
        model_speed, "measure", lambda *_: flags.append(os.environ["XLA_FLAGS"]) or row
    )
    call = ["--small", "--models", "Llama-3.1-8B", "--batches", "1", "--output", str(tmp_path)]
    model_speed.main([*call, "--graph-loop"])
    assert set(flags) == {f"--xla_before=1 {model_speed.GRAPH_LOOP}"}
    report = json.loads((tmp_path / "models.json").read_text())
    assert report["graph_loop"] is True
    assert list(report["models"]) == ["Llama-3.1-8B"]
    assert "the loop over tokens in the command buffer" in (tmp_path / "models.md").read_text()
    with pytest.raises(SystemExit):
        model_speed.main(["--models", "Llama-4"])
    assert "no model 'Llama-4'" in capsys.readouterr().err


def test_kernels_are_listed_by_the_time_they_took(tmp_path, capsys):
    def name(kind, text, **place):
        return {"ph": "M", "name": kind, "args": {"name": text}} | place

    def event(text, pid, tid, dur):
        return {"ph": "X", "name": text, "pid": pid, "tid": tid, "ts": 0, "dur": dur}

    events = [
        name("process_name", "/device:GPU:0", pid=1),
        name("process_name", "/host:CPU", pid=2),
        name("thread_name", "Stream #13(Compute)", pid=1, tid=5),
        name("thread_name", "XLA Modules", pid=1, tid=6),
        name("thread_name", "Stream", pid=2, tid=5),
        *(event("fused", 1, 5, 2000), event("grouped", 1, 5, 1500), event("grouped", 1, 5, 1500)),
        *(event("jit_decode", 1, 6, 9000), event("wait", 2, 5, 9000)),
    ]
    path = tmp_path / "a.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    model_speed.print_kernels(path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a.trace.json.gz: 5.00 ms of 3 kernels"
    assert [line.split() for line in lines[1:]] == [
        ["3.000", "ms", "2", "x", "grouped"],
        ["2.000", "ms", "1", "x", "fused"],
    ]


@pytest.mark.parametrize(("name", "batch"), [("Llama-3.1-8B", 4), ("Qwen3-30B-A3B", 3)])
def test_a_step_reads_every_weight_once_and_of_experts_those_that_are_touched(name, batch):
    shape = SMALL[name]
    model = jax.eval_shape(lambda: make_model(shape))
    found = count_step_bytes(model, shape, Case(batch, 30, 4))
    # 4 bits, and 3 bytes of scale and zero point for each group; rows are padded to tiles of 64
    expected = 0.0
    for path, spec in list_specs(shape).items():
        rows = -(-spec.out_features // 64) * 64
        groups = spec.in_features // spec.group_size
        nbytes = rows * (spec.in_features / 2 + 3 * groups)
        touched = 16 * (1 - (1 - 8 / 16) ** batch) if "experts" in path else 1
        expected += touched * nbytes
    plain = dict(shape.list_plain())
    rows, hidden = plain.pop("model.embed_tokens.weight")
    expected += 2 * batch * hidden  # its rows
    expected += sum(2 * size[0] * (size[1] if len(size) > 1 else 1) for size in plain.values())
    expected += batch * 32 * shape.layers * 2 * 128 * 2  # keys and values of one head
    assert found == pytest.approx(expected, rel=1e-6)
    assert isinstance(model, nnx.Module)
