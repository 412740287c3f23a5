"""Whole models with random weights: the script runs, and its limit counts all bytes."""

from __future__ import annotations

import json

import jax
import pytest
from flax import nnx

from benchmarks import model_speed
from benchmarks.model_speed import SMALL, Case, count_step_bytes, list_specs, make_model


def test_a_small_model_is_measured_and_written(tmp_path, monkeypatch, capsys):
    name = "Qwen3-30B-A3B"
    monkeypatch.setattr(model_speed, "SMALL", {name: SMALL[name]})
    monkeypatch.setattr(model_speed, "SMALL_CASES", [Case(2, 16, 4)])
    model_speed.main(["--small", "--rounds", "1", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "models.json").read_text())
    decode = report["models"][name]["batch 2"]
    assert decode["share_of_limit"] == decode["limit_seconds"] / decode["step_seconds"] > 0
    assert len(decode["decode_tokens_per_second"]) == 1
    assert (tmp_path / "models.md").read_text() == capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models.json", "models.md"]


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
