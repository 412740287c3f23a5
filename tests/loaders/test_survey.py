"""A survey plans what can be planned, from headers alone, and lists all that is wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from loaders.files.folder import SINGLE
from loaders.plan import make_plan, survey_folder
from pallas_kernels.format.spec import QuantSpec
from tests.folders import (
    describe_entry,
    make_config,
    make_experts,
    make_tensors,
    prefix_names,
    write_folder,
    write_raw,
)

SPEC = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=96, out_features=16)
CHANNEL = QuantSpec(bits=4, group_size=-1, symmetric=True, in_features=36, out_features=7)
DOWN = dataclasses.replace(SPEC, in_features=32, out_features=96, group_size=16)


def _make_experts(shape: str) -> dict[str, np.ndarray]:
    """Two experts, one by one or stacked, with a `weight_shape` of one of the kinds there are."""
    first = dataclasses.replace(SPEC, out_features=32)
    both = dataclasses.replace(SPEC, out_features=64)
    if shape == "separate":
        names = ("gate_proj", "up_proj", "down_proj")
        return make_experts("m.experts", first, DOWN, names=names, experts=2)
    tensors = {}
    for name, spec in (("gate_up_proj", both), ("down_proj", DOWN)):
        found = make_tensors(spec)
        n, k = spec.out_features, spec.in_features
        row = [n // 2, k, n // 2, k] if shape == "[E, 4]" and name == "gate_up_proj" else [n, k]
        stacked = {role: np.stack([array] * 2) for role, array in found.items()}
        stacked["weight_shape"] = np.array([2, n, k]) if shape == "[3]" else np.array([row] * 2)
        tensors |= prefix_names(f"m.experts.{name}", stacked)
    return tensors


@pytest.mark.parametrize("shape", ["separate", "[3]", "[E, 2]", "[E, 4]"])
def test_headers_tell_what_the_shapes_hold(tmp_path, shape):
    tensors = _make_experts(shape) | prefix_names("m.q", make_tensors(SPEC))
    config = make_config(SPEC, DOWN, targets=[["Linear"], ["re:.*down_proj"]])
    folder = write_folder(tmp_path / "c", config, [tensors])
    whole = make_plan(folder)
    hollow = {name: a * (not name.endswith("weight_shape")) for name, a in tensors.items()}
    survey = survey_folder(write_folder(tmp_path / "hollow", config, [hollow]), headers_only=True)
    assert survey.faults == ()
    assert survey.plan.specs == whole.specs
    assert survey.plan.stacks.keys() == whole.stacks.keys() == {"m.experts.w13", "m.experts.w2"}
    assert {p: m.spec for p, m in survey.plan.quantized.items()} == {
        p: m.spec for p, m in whole.quantized.items()
    }


def test_where_headers_do_not_tell_k_it_is_read_and_else_the_largest(tmp_path):
    tensors = make_tensors(CHANNEL)
    config = make_config(CHANNEL)
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= {
        "strategy": "channel",
        "group_size": None,
    }
    folder = write_folder(tmp_path / "c", config, [prefix_names("m", tensors)])
    assert survey_folder(folder, headers_only=True).plan.specs["m"] == CHANNEL
    hollow = tensors | {"weight_shape": np.zeros(2, np.int64)}
    folder = write_folder(tmp_path / "hollow", config, [prefix_names("m", hollow)])
    spec = survey_folder(folder, headers_only=True).plan.specs["m"]
    assert (spec.out_features, spec.in_features) == (7, 40)
    assert survey_folder(folder).faults != ()


def test_a_shape_of_another_dtype_is_a_fault_though_it_is_not_read(tmp_path):
    tensors = make_tensors(SPEC) | {"weight_shape": np.array([16, 96], np.float32)}
    folder = write_folder(tmp_path / "c", make_config(SPEC), [prefix_names("m", tensors)])
    [fault] = survey_folder(folder, headers_only=True).faults
    assert fault.tensor == "m.weight_shape"


def test_modules_with_faults_are_left_out_with_their_tensors(tmp_path):
    bad = make_tensors(SPEC)
    del bad["weight_scale"]
    tensors = prefix_names("a", bad) | prefix_names("b", make_tensors(SPEC))
    survey = survey_folder(write_folder(tmp_path / "c", make_config(SPEC), [tensors]))
    assert survey.plan.quantized.keys() == {"b"}
    assert survey.unplanned.keys() == {f"a.{role}" for role in bad}
    assert survey.incomplete == {"a"}
    assert [fault.tensor for fault in survey.faults] == ["a.weight_scale"]


def test_what_a_missing_file_holds_is_no_fault_of_its_own(tmp_path):
    """Half a module, experts and a plain tensor: one fault, of the file."""
    experts = _make_experts("separate")
    module = prefix_names("m.q", make_tensors(SPEC))
    lost = {name: a for name, a in experts.items() if ".0." in name} | {"n.weight": np.ones(3)}
    lost |= {"m.q.weight_scale": module.pop("m.q.weight_scale")}
    kept = module | {name: a for name, a in experts.items() if name not in lost}
    config = make_config(SPEC, DOWN, targets=[["Linear"], ["re:.*down_proj"]], ignore=["n"])
    folder = write_folder(tmp_path / "c", config | {"num_experts": 2}, [lost, kept])
    (folder / "model-00001-of-00002.safetensors").unlink()
    survey = survey_folder(folder)
    [fault] = survey.faults
    assert (fault.file, fault.what) == ("model-00001-of-00002.safetensors", "the file is missing")
    assert set(survey.plan.quantized) == {
        f"m.experts.1.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert set(survey.absent) == set(lost)
    assert survey.unplanned.keys() == module.keys()
    assert {"m.q", "n", "m.experts"} <= survey.incomplete
    assert survey.plan.warnings == ()  # such as: pattern "n" matches no module


def test_tensors_of_a_file_whose_header_contradicts_it_are_planned_and_it_is_unsound(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    header = {
        "a.weight": describe_entry("F32", [2], 0, 8),
        "b.weight": describe_entry("F32", [9], 8, 44),
    }
    write_raw(tmp_path / SINGLE, header, b"\0" * 8)
    survey = survey_folder(tmp_path)
    assert survey.plan.plain.keys() == {"a.weight", "b.weight"}
    assert survey.unsound == {SINGLE}
    [fault] = survey.faults
    assert fault.way_out == "the file is truncated: download it again"


def test_shapes_in_an_unsound_file_are_told_by_the_headers(tmp_path):
    folder = write_folder(
        tmp_path / "c", make_config(SPEC), [prefix_names("m", make_tensors(SPEC))]
    )
    path = folder / SINGLE
    content = path.read_bytes()
    path.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    survey = survey_folder(folder)
    assert survey.plan.specs == {"m": SPEC}
    assert len(survey.faults) == 1
