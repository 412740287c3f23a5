"""`jaxwna16 inspect` of sparse, incomplete and faulty checkpoints: it shows what can be told."""

from __future__ import annotations

import json

import numpy as np
import pytest

from loaders.files.folder import INDEX
from pallas_kernels.format.spec import QuantSpec
from tests.folders import make_config
from tests.jaxwna16.cli.checkpoints import edit_config, edit_tensors
from tests.sparse import describe_linear, describe_llama, write_sparse

SPEC = QuantSpec(bits=4, group_size=128, symmetric=False, in_features=128, out_features=8)
LLAMA_70B = {
    "layers": 80,
    "hidden": 8192,
    "inner": 28672,
    "kv": 1024,
    "vocabulary": 128256,
}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def hollow(tmp_path_factory):
    """Llama-70B: 40 GB, of which only the headers are on the disk."""
    config = make_config(SPEC, ignore=["lm_head"])
    folder = tmp_path_factory.mktemp("hollow") / "c"
    return write_sparse(folder, config, describe_llama(**LLAMA_70B))


def test_a_checkpoint_of_which_there_are_only_headers_is_shown_in_full(call, hollow):
    assert sum(path.stat().st_blocks for path in hollow.iterdir()) * 512 < 8e6
    outcome = call("inspect", hollow, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    report = outcome.report
    assert report["totals"]["parameters"] == 70_553_706_496
    files = sum(path.stat().st_size for path in hollow.glob("*.safetensors"))
    assert 39e9 < report["totals"]["bytes"] < files < report["totals"]["bytes"] + 1e6
    rows = {row["modules"].rpartition(".")[2]: row for row in report["quantized"]}
    down = rows["down_proj"]
    assert (down["count"], down["out_features"], down["in_features"]) == (80, 8192, 28672)


def _copy_headers(hollow, folder, drop=None, cut=None):
    """Links to all files but one that is left out and one that is cut short."""
    folder.mkdir()
    for path in hollow.iterdir():
        if path.name == cut:
            with path.open("rb") as file:
                (folder / path.name).write_bytes(file.read(10_000))
        elif path.name != drop:
            (folder / path.name).hardlink_to(path)
    return folder


def test_what_a_missing_file_does_not_hold_is_shown(call, hollow, tmp_path):
    folder = _copy_headers(hollow, tmp_path / "c", drop="model-00003.safetensors")
    outcome = call("inspect", folder, "--json")
    assert outcome.code == 1
    report = outcome.report
    [fault] = report["error"]["faults"]
    assert (fault["file"], fault["what"]) == ("model-00003.safetensors", "the file is missing")
    assert {row["count"] for row in report["quantized"]} == {79}
    absent = {row["modules"]: row["count"] for row in report["absent"]}
    assert absent["model.layers.*.mlp.up_proj"] == absent["model.layers.*.input_layernorm"] == 1
    assert len(absent) == 9
    text = call("inspect", folder)
    assert "79  model.layers.*.mlp.up_proj" in text.out
    assert "model-00003.safetensors: 9 modules" in text.out
    assert "model-00003.safetensors: the file is missing" in text.err


def test_what_the_header_of_a_truncated_file_says_is_shown(call, hollow, tmp_path):
    folder = _copy_headers(hollow, tmp_path / "c", cut="model-00003.safetensors")
    outcome = call("inspect", folder, "--json")
    assert outcome.code == 1
    assert {row["count"] for row in outcome.report["quantized"]} == {80}
    [fault] = outcome.report["error"]["faults"]
    assert fault["file"] == "model-00003.safetensors"
    assert "the file is truncated" in fault["way_out"]


def test_experts_of_which_a_file_is_missing_are_said_to_be_absent_and_nothing_more(call, tmp_path):
    """No "127 of 128 experts are missing", no "weight_scale is missing"."""
    names = ("gate_proj", "up_proj", "down_proj")
    parts = [
        describe_linear(f"model.layers.{layer}.mlp.experts.{expert}.{name}", 128, 128)
        for layer in range(2)
        for expert in range(4)
        for name in names
    ]
    first, *others = parts
    torn = {name: others[0].pop(name) for name in [*others[0]][:1]}
    config = make_config(SPEC) | {"num_experts": 4}
    folder = write_sparse(tmp_path / "c", config, [first | torn, *others])
    (folder / "model-00001.safetensors").unlink()
    (folder / "model-00007.safetensors").unlink()
    report = call("inspect", folder, "--json").report
    faults = {fault["file"]: fault["what"] for fault in report["error"]["faults"]}
    assert set(faults.values()) == {"the file is missing"}
    assert len(report["error"]["faults"]) == 2
    assert sum(row["count"] for row in report["quantized"]) == 22
    assert [row["tensors"] for row in report["unplanned"]] == [
        "model.layers.*.mlp.experts.*.up_proj.weight_packed"
    ]


def test_modules_without_faults_are_shown_beside_those_with(call, broken):
    def damage(tensors):
        del tensors[f"{Q}.weight_zero_point"]
        name = "model.layers.1.mlp.down_proj.weight_scale"
        tensors[name] = tensors[name][:, :1].copy()

    edit_tensors(broken, damage)
    outcome = call("inspect", broken, "--json")
    assert outcome.code == 1
    report = outcome.report
    assert sum(row["count"] for row in report["quantized"]) == 12
    assert len(report["error"]["faults"]) == 2
    unplanned = {row["tensors"] for row in report["unplanned"]}
    assert "model.layers.*.self_attn.q_proj.weight_packed" in unplanned
    assert len(unplanned) == 3 + 4
    assert "7 tensors in the table, see the errors" in call("inspect", broken).out


def test_of_a_config_that_cannot_be_read_the_tensors_are_shown(call, broken):
    edit_config(broken, lambda c: c["quantization_config"].update(quant_method="bitsandbytes"))
    outcome = call("inspect", broken, "--json")
    assert outcome.code == 1
    report = outcome.report
    assert report["quantized"] == []
    assert sum(row["count"] for row in report["unplanned"]) == 14 * 4
    assert {"lm_head.weight", "model.norm.weight"} <= {row["tensors"] for row in report["plain"]}
    assert len(report["error"]["faults"]) == 1


def test_if_nothing_can_be_read_there_is_the_error_alone(call, broken):
    index = {"weight_map": {"a": "gone.safetensors"}}
    (broken / INDEX).write_text(json.dumps(index))
    outcome = call("inspect", broken, "--json")
    assert outcome.code == 1
    assert outcome.report.keys() == {"error"}


def test_shapes_that_contradict_the_words_stay_a_fault(call, broken):
    """K of the header is 64 by the scales and 32 by the words."""

    def cut(tensors):
        tensors[f"{Q}.weight_packed"] = np.ascontiguousarray(tensors[f"{Q}.weight_packed"][:, :4])

    edit_tensors(broken, cut)
    [fault] = call("inspect", broken, "--json").report["error"]["faults"]
    assert fault["tensor"] == f"{Q}.weight_packed"
    assert "expected int32 [64, 8], found int32 [64, 4]" in fault["what"]
