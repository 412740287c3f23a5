"""`jaxwna16 inspect`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import loaders.plan


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


def test_no_weight_is_read(call, packed_folder, monkeypatch):
    read, read_tensor = [], loaders.plan.read_tensor

    def note(info):
        read.append(info.name)
        return read_tensor(info)

    monkeypatch.setattr("loaders.plan.read_tensor", note)
    call("inspect", packed_folder)
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
