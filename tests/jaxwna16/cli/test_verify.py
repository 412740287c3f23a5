"""`jaxwna16 verify`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.folders import write_folder
from tests.golden import write_golden
from tests.jaxwna16.cli.checkpoints import edit_config, edit_tensors

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def test_a_good_checkpoint_is_good(call, packed_folder):
    outcome = call("verify", packed_folder)
    assert outcome.code == 0
    assert "good: 14 quantized modules and 7 other tensors" in outcome.out
    assert "the llama model finds every tensor it needs" in outcome.out
    assert "warning" not in outcome.out


def test_the_report_counts_what_was_read(call, packed_folder):
    report = call("verify", packed_folder, "--json").report
    assert (report["modules"], report["tensors"], report["warnings"]) == (14, 7, [])
    assert report["model"] == {"model_type": "llama", "checked": True, "reason": ""}


def test_faults_of_the_model_and_of_the_numbers_are_listed_together(call, broken):
    def damage(tensors):
        tensors[f"{Q}.weight_scale"][3, 1] = np.nan
        tensors[f"{DOWN}.weight_scale"][0] = 0
        del tensors["model.norm.weight"]

    edit_tensors(broken, damage)
    outcome = call("verify", broken, "--json")
    assert outcome.code == 1
    faults = {fault["tensor"]: fault for fault in outcome.report["error"]["faults"]}
    assert {"model.norm.weight", f"{Q}.weight_scale", f"{DOWN}.weight_scale"} == faults.keys()
    assert "[3, 1]" in faults[f"{Q}.weight_scale"]["what"]


def test_faults_of_modules_and_of_numbers_are_listed_together(call, broken):
    """And what lacks a tensor is not said to be missing in the model, too."""

    def damage(tensors):
        del tensors[f"{Q}.weight_zero_point"]
        tensors[f"{DOWN}.weight_scale"][0] = 0
        del tensors["model.norm.weight"]

    edit_tensors(broken, damage)
    outcome = call("verify", broken, "--json")
    assert outcome.code == 1
    faults = [fault["tensor"] for fault in outcome.report["error"]["faults"]]
    assert sorted(faults) == sorted(
        [f"{Q}.weight_zero_point", f"{DOWN}.weight_scale", "model.norm.weight"]
    )
    assert outcome.report["modules"] == 13


def test_a_config_that_cannot_be_read_leaves_the_other_tensors_to_be_checked(call, broken):
    edit_config(broken, lambda c: c["quantization_config"].update(quant_method="bitsandbytes"))
    edit_tensors(broken, lambda t: t["model.norm.weight"].__setitem__(0, np.nan))
    outcome = call("verify", broken, "--json")
    assert outcome.code == 1
    [fault] = outcome.report["error"]["faults"]
    assert "found 'bitsandbytes'" in fault["what"]
    assert any("model.norm.weight: 1 of 64" in text for text in outcome.report["warnings"])


def test_a_truncated_file_is_not_read_and_the_others_are(call, broken):
    tensors = load_file(broken / "model.safetensors")
    tensors[f"{DOWN}.weight_scale"][0] = np.inf
    first = {name: array for name, array in tensors.items() if ".layers.0." in name}
    second = {name: array for name, array in tensors.items() if name not in first}
    config = json.loads((broken / "config.json").read_text())
    folder = write_folder(broken.parent / "shards", config, [first, second])
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    outcome = call("verify", folder, "--json")
    assert outcome.code == 1
    faults = {fault["file"]: fault for fault in outcome.report["error"]["faults"]}
    assert faults.keys() == {path.name, "model-00002-of-00002.safetensors"}
    assert "truncated" in faults[path.name]["way_out"]
    assert faults["model-00002-of-00002.safetensors"]["tensor"] == f"{DOWN}.weight_scale"
    assert (outcome.report["modules"], outcome.report["tensors"]) == (7, 5)
    assert "faulty: 7 quantized modules and 5 other tensors" in call("verify", folder).out


def test_zero_points_that_no_value_has_are_a_fault(call, tmp_path):
    """int8, as compressed-tensors 0.9.3 wrote them: 8 is one too many for 4 bits."""
    folder = write_golden(tmp_path / "c", "0.9.3")
    edit_tensors(folder, lambda t: t["w4_g32.weight_zero_point"].__setitem__((2, 1), 8))
    [fault] = call("verify", folder, "--json").report["error"]["faults"]
    assert fault["tensor"] == "w4_g32.weight_zero_point"
    assert fault["what"] == "1 of 18 zero points are outside of -8 to 7, the first at [2, 1]: 8"
    edit_tensors(folder, lambda t: t["w4_g32.weight_zero_point"].__setitem__((2, 1), -8))
    assert call("verify", folder).code == 0


def test_groups_that_are_out_of_range_are_a_fault(call, tmp_path):
    folder = write_golden(tmp_path / "c", "0.17.0")
    edit_tensors(folder, lambda t: t["reordered.weight_g_idx"].__setitem__(3, 2))
    [fault] = call("verify", folder, "--json").report["error"]["faults"]
    assert fault["tensor"] == "reordered.weight_g_idx"
    assert "1 of 64 input features are in no group of 2, the first at [3]: 2" in fault["what"]


def test_what_load_model_leaves_out_is_checked_and_no_fault(call, broken):
    def add(tensors):
        tensors["mtp.fc.weight"] = np.full((4, 4), np.inf, np.float32)

    edit_tensors(broken, add)
    report = call("verify", broken, "--json").report
    assert "error" not in report
    assert report["warnings"] == ["mtp.fc.weight: 16 of 16 values are not finite"]


def test_a_model_that_we_do_not_know_is_not_checked_but_its_tensors_are(call, broken):
    edit_config(broken, lambda config: config.update(model_type="gpt_neox"))
    outcome = call("verify", broken)
    assert outcome.code == 0
    assert "model not checked: this model is not supported" in outcome.out


@pytest.fixture
def loose_bits(broken):
    """36 inputs and 20 outputs at 4 bits: half of the last words is padding. No model uses it."""
    edit_config(broken, lambda config: config.update(model_type="none"))
    config = json.loads((broken / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["weights"] |= {"strategy": "channel", "group_size": None}
    edit_config(broken, lambda whole: whole.update(quantization_config=config))

    def replace(tensors):
        tensors.clear()
        tensors["odd.weight_packed"] = np.zeros((20, 5), np.int32)
        tensors["odd.weight_scale"] = np.ones((20, 1), np.float32)
        tensors["odd.weight_zero_point"] = np.zeros((3, 1), np.int32)
        tensors["odd.weight_shape"] = np.array([20, 36])

    edit_tensors(broken, replace)
    return broken


def test_bits_of_values_are_not_taken_for_padding(call, loose_bits):
    def fill(tensors):
        tensors["odd.weight_packed"][:, -1] = 0xFFFF
        tensors["odd.weight_zero_point"][-1] = 0xFFFF

    edit_tensors(loose_bits, fill)
    assert not any("padding" in w for w in call("verify", loose_bits, "--json").report["warnings"])


def test_set_padding_bits_are_a_warning(call, loose_bits):
    def fill(tensors):
        tensors["odd.weight_packed"][7, -1] = 1 << 16
        tensors["odd.weight_zero_point"][-1] = -1

    edit_tensors(loose_bits, fill)
    outcome = call("verify", loose_bits)
    assert outcome.code == 0
    assert "odd.weight_packed: padding bits are set in 1 words" in outcome.out
    assert "odd.weight_zero_point: padding bits are set in 1 words" in outcome.out


def test_numbers_that_are_not_finite_in_plain_tensors_are_a_warning(call, broken):
    def damage(tensors):
        tensors["model.norm.weight"][:2] = [np.nan, np.inf]

    edit_tensors(broken, damage)
    outcome = call("verify", broken)
    assert outcome.code == 0
    assert "warning: model.norm.weight: 2 of 64 values are not finite" in outcome.out


def _make_experts(stacked: bool) -> dict[str, np.ndarray]:
    """Three experts of 20 x 36 and 36 x 20; half of each last word is padding."""
    sizes = {"up_proj": (20, 36), "down_proj": (36, 20)}
    tensors = {}
    for name, (n, k) in sizes.items():
        roles = {
            "weight_packed": np.zeros((3, n, -(-k // 8)), np.int32),
            "weight_scale": np.ones((3, n, 1), np.float32),
            "weight_zero_point": np.zeros((3, -(-n // 8), 1), np.int32),
        }
        for role, array in roles.items():
            if stacked:
                tensors[f"m.experts.{name}.{role}"] = array
            else:
                tensors |= {f"m.experts.{i}.{name}.{role}": array[i].copy() for i in range(3)}
        if stacked:
            tensors[f"m.experts.{name}.weight_shape"] = np.array([3, n, k])
        else:
            shapes = {f"m.experts.{i}.{name}.weight_shape": np.array([n, k]) for i in range(3)}
            tensors |= shapes
    return tensors


@pytest.mark.parametrize("stacked", [False, True])
def test_each_expert_is_checked_by_itself(call, loose_bits, stacked):
    tensors = _make_experts(stacked)
    edit_tensors(loose_bits, lambda old: (old.clear(), old.update(tensors)))
    report = call("verify", loose_bits, "--json").report
    assert report["modules"] == 6
    assert report["bytes"] == sum(array.nbytes for array in tensors.values())

    def damage(tensors):
        if stacked:
            tensors["m.experts.up_proj.weight_packed"][1, 7, -1] = 1 << 16
            tensors["m.experts.down_proj.weight_scale"][2, 5] = np.nan
        else:
            tensors["m.experts.1.up_proj.weight_packed"][7, -1] = 1 << 16
            tensors["m.experts.2.down_proj.weight_scale"][5] = np.nan

    edit_tensors(loose_bits, damage)
    [fault] = call("verify", loose_bits, "--json").report["error"]["faults"]
    name = (
        "m.experts.down_proj.weight_scale[2]" if stacked else "m.experts.2.down_proj.weight_scale"
    )
    assert fault["tensor"] == name
    assert "1 of 36 scales are zero or not finite, the first at [5, 0]" in fault["what"]

    def repair(tensors):
        for name in [name for name in tensors if name.endswith("scale")]:
            tensors[name] = np.ones_like(tensors[name])

    edit_tensors(loose_bits, repair)
    warnings = call("verify", loose_bits, "--json").report["warnings"]
    [warning] = [text for text in warnings if "padding" in text]
    name = "up_proj.weight_packed[1]" if stacked else "1.up_proj.weight_packed"
    assert warning == f"m.experts.{name}: padding bits are set in 1 words"


def test_all_missing_experts_are_listed(call, loose_bits):
    def damage(tensors):
        tensors.clear()
        separate = _make_experts(stacked=False)
        tensors.update({k: v for k, v in separate.items() if ".1." not in k})

    edit_tensors(loose_bits, damage)
    edit_config(loose_bits, lambda config: config.update(num_experts=5))
    outcome = call("verify", loose_bits)
    assert outcome.code == 1
    assert "m.experts: 3 of 5 experts are missing: 1,3-4" in outcome.err
