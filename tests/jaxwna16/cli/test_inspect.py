"""`jaxwna16 inspect`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import loaders.plan
from pallas_kernels.spec import QuantSpec
from tests.folders import make_config, write_folder


def test_modules_that_differ_in_their_layer_are_one_line(call, packed_folder):
    outcome = call("inspect", packed_folder)
    assert outcome.code == 0
    assert outcome.err == ""
    lines = [line.split() for line in outcome.out.splitlines()]
    assert "2 model.layers.*.mlp.down_proj 64 x 96 W4 g32 asym 7.9 kB".split() in lines
    assert "1 lm_head 257 x 64 float32 65.8 kB".split() in lines


def test_every_line_fits_into_80_columns(call, packed_folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, call("inspect", packed_folder).out.splitlines())) <= 80


def test_the_bytes_of_the_groups_add_up_to_those_of_the_file(call, packed_folder):
    report = call("inspect", packed_folder, "--json").report
    totals = report["totals"]
    assert sum(row["bytes"] for row in report["quantized"]) == totals["quantized_bytes"]
    assert sum(row["bytes"] for row in report["plain"]) == totals["plain_bytes"]
    with (packed_folder / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert totals["bytes"] == (packed_folder / "model.safetensors").stat().st_size - header
    assert sum(row["count"] for row in report["quantized"]) == 14


def test_parameters_are_counted_as_in_the_float_checkpoint(call, packed_folder, float_folder):
    packed = call("inspect", packed_folder, "--json").report["totals"]
    plain = call("inspect", float_folder, "--json").report["totals"]
    assert packed["parameters"] == plain["parameters"] == plain["bytes"] // 4
    assert packed["bfloat16_bytes"] == plain["bytes"] // 2
    assert packed["ratio"] == pytest.approx(packed["bfloat16_bytes"] / packed["bytes"])


def test_no_weight_is_read_and_each_file_opened_once(call, packed_folder, monkeypatch):
    calls, read_tensors = [], loaders.plan.read_tensors

    def note(infos):
        calls.append([info.name for info in infos])
        return read_tensors(infos)

    monkeypatch.setattr("loaders.plan.read_tensors", note)
    call("inspect", packed_folder)
    [read] = calls
    assert len(read) == 14
    assert all(name.endswith(".weight_shape") for name in read)


def test_an_unknown_architecture_is_shown_all_the_same(call, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "convnet"}))
    save_file({"stem.weight": np.ones((3, 5, 7), np.float16)}, tmp_path / "model.safetensors")
    report = call("inspect", tmp_path, "--json").report
    assert report["load_model"]["supported"] is False
    assert report["plain"][0]["shape"] == [3, 5, 7]
    outcome = call("inspect", tmp_path)
    assert outcome.code == 0
    assert "convnet" in outcome.out


def test_the_backend_of_this_machine_is_named_with_its_reason(call, packed_folder):
    backends = call("inspect", packed_folder, "--json").report["backends"]
    assert {choice["bits"] for choice in backends} == {4}
    assert all(choice["reason"] for choice in backends)


def test_control_characters_in_names_do_not_reach_the_terminal(call, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a\x1b[2Jb": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    outcome = call("inspect", tmp_path)
    assert "\x1b" not in outcome.out
    assert "a\\x1b[2Jb" in outcome.out


def _write_experts(folder, stacked: bool):
    """Two layers of four experts, 4 bits in groups of 32; one by one, or in stacked tensors."""
    shapes = {"gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64)}
    if stacked:
        shapes = {"gate_up_proj": (4, 128, 96), "down_proj": (4, 96, 64)}
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}{name}.{role}": array
        for layer in range(2)
        for expert in ([""] if stacked else [f"{i}." for i in range(4)])
        for name, (*first, n, k) in shapes.items()
        for role, array in {
            "weight_packed": np.zeros((*first, n, k // 8), np.int32),
            "weight_scale": np.ones((*first, n, k // 32), np.float16),
            "weight_shape": np.array([*first, n, k]),
        }.items()
    }
    tensors["model.layers.0.mlp.gate.weight"] = np.zeros((4, 96), np.float16)
    spec = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=96, out_features=64)
    return write_folder(folder, make_config(spec) | {"num_experts": 4}, [tensors])


def test_experts_are_one_line_for_each_projection(call, tmp_path):
    rows = call("inspect", _write_experts(tmp_path / "c", False), "--json").report["quantized"]
    assert {row["modules"]: row["count"] for row in rows} == {
        f"model.layers.*.mlp.experts.*.{name}": 8 for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_stacked_experts_are_counted_one_by_one(call, tmp_path):
    separate, stacked = (
        call("inspect", _write_experts(tmp_path / str(flag), flag), "--json").report
        for flag in (False, True)
    )
    assert [(row["modules"], row["count"]) for row in stacked["quantized"]] == [
        ("model.layers.*.mlp.experts.down_proj[*]", 8),
        ("model.layers.*.mlp.experts.gate_up_proj[*]", 8),
    ]
    shapes = {(row["out_features"], row["in_features"]) for row in stacked["quantized"]}
    assert shapes == {(128, 96), (96, 64)}
    assert stacked["totals"]["parameters"] == separate["totals"]["parameters"]
    # 16 bytes for each of 24 shapes in one file, 24 for each of 4 in the other
    assert stacked["totals"]["bytes"] == separate["totals"]["bytes"] - 24 * 16 + 4 * 24
    stacked_bytes = sum(row["bytes"] for row in stacked["quantized"])
    assert stacked_bytes == stacked["totals"]["quantized_bytes"]


def test_stacked_floats_are_counted_one_by_one(call, tmp_path):
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": np.zeros((4, 128, 96), np.float16),
        "model.layers.0.mlp.experts.down_proj": np.zeros((4, 96, 64), np.float16),
    }
    outcome = call("inspect", write_folder(tmp_path / "c", {}, [tensors]))
    lines = [line.split() for line in outcome.out.splitlines()]
    assert "4 model.layers.*.mlp.experts.gate_up_proj[*] 128 x 96 float16 98.3 kB".split() in lines
