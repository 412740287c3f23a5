"""`jaxwna16 inspect`."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import loaders.modules.sizes
from pallas_kernels.backends import explain
from pallas_kernels.format.spec import QuantSpec
from tests.folders import make_config, make_tensors, write_folder
from tests.golden import write_golden
from tests.jaxwna16.cli.checkpoints import edit_config, edit_tensors


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


def _note_reads(monkeypatch) -> list[str]:
    names, read_tensors = [], loaders.modules.sizes.read_tensors

    def note(infos):
        infos = list(infos)
        names.extend(info.name for info in infos)
        return read_tensors(infos)

    monkeypatch.setattr("loaders.modules.sizes.read_tensors", note)
    return names


def test_nothing_but_headers_is_read(call, packed_folder, monkeypatch):
    names = _note_reads(monkeypatch)
    assert call("inspect", packed_folder).code == 0
    assert names == []


def test_a_shape_that_no_header_tells_is_read(call, tmp_path, monkeypatch):
    """36 input features of 4 bits in one group take as many words as 40."""
    spec = QuantSpec(bits=4, group_size=-1, symmetric=True, in_features=36, out_features=5)
    tensors = {f"m.{role}": array for role, array in make_tensors(spec).items()}
    folder = write_folder(tmp_path / "c", _make_channel_config(), [tensors])
    names = _note_reads(monkeypatch)
    [row] = call("inspect", folder, "--json").report["quantized"]
    assert (row["in_features"], row["strategy"]) == (36, "channel")
    assert names == ["m.weight_shape"]


def _make_channel_config() -> dict:
    weights = {"num_bits": 4, "symmetric": True, "strategy": "channel", "group_size": None}
    group = {"targets": ["Linear"], "weights": weights}
    return {"quantization_config": {"config_groups": {"group_0": group}, "version": "0.20.0"}}


def test_an_unknown_architecture_is_shown_all_the_same(call, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "convnet", "torch_dtype": "float16"})
    )
    save_file({"stem.weight": np.ones((3, 5, 7), np.float16)}, tmp_path / "model.safetensors")
    report = call("inspect", tmp_path, "--json").report
    assert report["load_model"]["supported"] is False
    assert report["load_model"]["dtype"] == "float16"
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
    assert all(row["experts"] for row in rows)
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


def test_widths_without_a_kernel_are_stated_with_the_bytes_that_widening_takes(call, tmp_path):
    folder = write_golden(tmp_path / "c", "0.17.0")
    report = call("inspect", folder, "--json").report
    rows = {row["modules"]: row for row in report["quantized"]}
    facts = {name: (rows[name]["bits"], rows[name]["widened_to"]) for name in rows}
    assert facts["w3_g32"] == (3, 4)
    assert facts["w6_g32"] == (6, 8)
    assert facts["reordered"] == (4, None)
    assert rows["w3_g32"]["extra_bytes"] == 9 * 64 * 1 // 8
    assert rows["w6_g32"]["extra_bytes"] == 9 * 64 * 2 // 8
    assert report["totals"]["extra_bytes"] == sum(row["extra_bytes"] for row in rows.values())
    assert rows["w3_g32"]["packing"] == "aligned"
    outcome = call("inspect", folder)
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert "1 w3_g32 9 x 64 W3 g32 asym as W4 312 bytes" in lines
    assert "widened to 4 or 8 bits in memory: 896 bytes more" in lines


def test_act_order_is_named(call, tmp_path):
    folder = write_golden(tmp_path / "c", "0.9.3")
    rows = call("inspect", folder, "--json").report["quantized"]
    ordered = {row["modules"]: row["act_order"] for row in rows}
    assert ordered["reordered"] is True
    assert ordered["w4_g32"] is False
    assert "W4 g32 asym act-order" in call("inspect", folder).out


def test_each_module_has_its_backend_with_the_reason(call, broken):
    """Packed embeddings have none: a model looks their rows up."""

    def pack_the_embedding(tensors):
        del tensors["model.embed_tokens.weight"]
        spec = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=64, out_features=257)
        named = make_tensors(spec).items()
        tensors |= {f"model.embed_tokens.{role}": array for role, array in named}

    edit_tensors(broken, pack_the_embedding)
    edit_config(
        broken,
        lambda config: config["quantization_config"]["config_groups"]["group_0"].update(
            targets=["Linear", "Embedding"]
        ),
    )
    rows = call("inspect", broken, "--json").report["quantized"]
    backends = {row["modules"]: row["backend"] for row in rows}
    assert backends.pop("model.embed_tokens") is None
    assert set(backends.values()) == {"xla"}
    assert all(row["reason"] and not row["experts"] for row in rows)
    lines = call("inspect", broken).out
    assert "none for model.embed_tokens in float32: load_model holds them as floats" in lines


def test_on_a_gpu_each_module_has_the_backend_of_the_models_dtype(call, broken, monkeypatch):
    for module in ("rows", "backends"):
        monkeypatch.setattr(f"jaxwna16.cli.{module}.explain", partial(explain, platform="cuda"))
    rows = call("inspect", broken, "--json").report["quantized"]
    assert {row["backend"] for row in rows} == {"xla"}
    edit_config(broken, lambda config: config.update(dtype="bfloat16"))
    rows = call("inspect", broken, "--json").report["quantized"]
    assert {(row["backend"], row["reason"]) for row in rows} == {
        ("triton", "fused 4-bit kernel for 16-bit activations on cuda")
    }
    out = call("inspect", broken).out
    assert "triton for bfloat16, float16: fused 4-bit kernel" in out
    assert "xla for float32: the fused kernels multiply 16-bit activations" in out


def test_without_a_device_all_else_is_shown(call, packed_folder, monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", fail)
    report = call("inspect", packed_folder, "--json").report
    assert report["backends"] == []
    assert {row["backend"] for row in report["quantized"]} == {None}
    outcome = call("inspect", packed_folder)
    assert outcome.code == 0
    assert "JAX cannot use any device: Unable to initialize backend 'cuda'" in outcome.out


def test_what_load_model_leaves_out_is_listed_with_the_reason(call, broken):
    def add(tensors):
        tensors["model.visual.patch_embed.weight"] = np.ones((8, 4), np.float32)
        tensors["model.layers.2.eh_proj.weight"] = np.ones((64, 128), np.float32)
        spec = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=64, out_features=96)
        named = make_tensors(spec).items()
        tensors |= {f"model.layers.2.mlp.up_proj.{role}": array for role, array in named}

    edit_tensors(broken, add)
    edit_config(broken, lambda config: config.update(num_nextn_predict_layers=1))
    outcome = call("inspect", broken, "--json")
    assert outcome.code == 0
    reasons = {row["tensors"]: row["skipped"] for row in outcome.report["plain"]}
    assert reasons.pop("model.visual.patch_embed.weight") == "the vision tower"
    assert reasons.pop("model.layers.*.eh_proj.weight").startswith("past the last of 2 layers")
    assert set(reasons.values()) == {""}
    sums = {entry["reason"]: entry["bytes"] for entry in outcome.report["skipped"]}
    assert sums.pop("the vision tower") == 8 * 4 * 4
    [row] = [row for row in outcome.report["quantized"] if row["skipped"]]
    assert (row["modules"], row["count"]) == ("model.layers.*.mlp.up_proj", 1)
    assert list(sums.values()) == [64 * 128 * 4 + row["bytes"]]
    text = call("inspect", broken).out
    assert "1 other tensor, 128 bytes, by load_model: the vision tower" in text


def test_flax_and_torch_stay_closed(packed_folder):
    script = (
        "import sys; from jaxwna16.cli.main import main; code = main(sys.argv[1:]); "
        "print(code, [name for name in ('flax', 'torch', 'orbax') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, "inspect", str(packed_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
