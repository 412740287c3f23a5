"""Every way in which a checkpoint can be wrong: one clear error, exit code 1, on every verb."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxwna16
from tests.jaxwna16.cli.checkpoints import edit_config, edit_tensors

Q = "model.layers.0.self_attn.q_proj"


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def leave_only_a_few_bytes(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00")


def remove_the_weights(folder):
    (folder / "model.safetensors").unlink()


def remove_a_shard(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    save_file({name: tensors[name] for name in names[:9]}, folder / "a.safetensors")
    weight_map = {
        name: "a.safetensors" if i < 9 else "b.safetensors" for i, name in enumerate(names)
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def remove_a_zero_point(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{Q}.weight_zero_point"))


def cut_a_scale(folder):
    def cut(tensors):
        tensors[f"{Q}.weight_scale"] = tensors[f"{Q}.weight_scale"][:, :1].copy()

    edit_tensors(folder, cut)


def cast_the_packed_words_to_floats(folder):
    def cast(tensors):
        tensors[f"{Q}.weight_packed"] = tensors[f"{Q}.weight_packed"].astype(np.float32)

    edit_tensors(folder, cast)


def name_another_format(folder):
    def edit(config):
        config["quantization_config"]["config_groups"]["group_0"]["format"] = "marlin-24"

    edit_config(folder, edit)


def quantize_the_activations(folder):
    def edit(config):
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["input_activations"] = {"num_bits": 8}

    edit_config(folder, edit)


def remove_the_config(folder):
    (folder / "config.json").unlink()


def empty_the_config(folder):
    (folder / "config.json").write_text("")


def remove_the_folder(folder):
    shutil.rmtree(folder)


DAMAGES = {
    truncate: "truncated",
    leave_only_a_few_bytes: "truncated",
    remove_the_weights: "model.safetensors: the file is missing",
    remove_a_shard: "b.safetensors: the file is missing",
    remove_a_zero_point: f"{Q}.weight_zero_point: the tensor is missing",
    cut_a_scale: f"{Q}.weight_scale: expected",
    cast_the_packed_words_to_floats: f"{Q}.weight_packed: expected int32",
    name_another_format: "found 'marlin-24'",
    quantize_the_activations: "quantized activations are not supported",
    remove_the_config: "config.json: the file is missing",
    empty_the_config: "config.json: not valid JSON",
    remove_the_folder: "not a folder",
}


def list_calls(folder) -> list[list]:
    made = folder.parent / "made"
    return [
        ["inspect", folder],
        ["verify", folder],
        ["dequantize", folder, made],
        ["quantize", folder, made, "--group-size", 32],
        ["generate", folder, "--prompt", "Hello"],
        ["eval", "perplexity", folder, "--text", __file__],
    ]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_one_clear_error(call, broken, damage):
    damage(broken)
    for argv in list_calls(broken):
        outcome = call(*argv)
        assert outcome.code == 1
        # these two also report what they could make out
        assert outcome.out == "" or argv[0] in ("inspect", "verify")
        assert outcome.err.startswith(f"error: {broken}: 1 fault")
        assert DAMAGES[damage] in outcome.err
        left = {path.name for path in broken.parent.iterdir()} - {"broken"}
        assert not left, "half a checkpoint was written"


def test_with_json_the_error_is_an_object_with_every_fault(call, broken):
    remove_a_zero_point(broken)
    cut_a_scale(broken)
    outcome = call("verify", broken, "--json")
    assert outcome.code == 1
    error = outcome.report["error"]
    assert error["message"] == f"{broken}: 2 faults"
    assert [sorted(fault) for fault in error["faults"]] == [
        ["file", "tensor", "way_out", "what"]
    ] * 2
    assert {fault["tensor"] for fault in error["faults"]} == {
        f"{Q}.weight_zero_point",
        f"{Q}.weight_scale",
    }


def test_an_empty_name_is_not_the_working_folder(call, packed_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(packed_folder)
    for argv in (["inspect", ""], ["verify", ""], ["convert", "", "x"]):
        outcome = call(*argv)
        assert (outcome.code, outcome.out) == (1, "")
        assert "the checkpoint's name is empty" in outcome.err
    with pytest.raises(jaxwna16.InputError, match="the checkpoint's name is empty"):
        jaxwna16.dequantize_checkpoint("", tmp_path / "made")
