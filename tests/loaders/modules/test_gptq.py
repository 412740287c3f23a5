"""Checkpoints of AutoGPTQ and GPTQModel load exactly, or are refused by name."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from loaders.plan import make_plan
from loaders.stream import check_padding, check_scales, load_params, read_parts
from pallas_kernels.format.dequantize import dequantize
from tests.awq_gptq import (
    Linear,
    convert_to_pack_quantized,
    describe_gptq,
    describe_pack_quantized,
    list_faults,
    make_linear,
    pack_gptq,
    pack_gptqmodel,
)
from tests.checkpoints import assert_same_bits
from tests.folders import prefix_names, write_folder
from tests.grids import sample


def _write(folder: Path, linear: Linear, tensors: dict | None = None, **changes: Any) -> Path:
    config = {"quantization_config": describe_gptq(linear, **changes)}
    tensors = pack_gptq(linear) if tensors is None else tensors
    return write_folder(folder, config, [prefix_names("m", tensors)])


def _load(folder: Path) -> np.ndarray:
    plan = make_plan(folder)
    return np.asarray(dequantize(load_params(plan)["m"], plan.specs["m"]))


def _list_warnings(folder: Path) -> list[str]:
    plan = make_plan(folder)
    [(_, arrays)] = read_parts(plan)
    return check_padding(plan.quantized["m"], arrays)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "act_order", "format"),
    sample(
        itertools.product(
            (2, 3, 4, 8), (32, -1), (False, True), (False, True), ("gptq", "gptq_v2")
        ),
        every=7,
    ),
)
def test_every_kind_is_the_documented_formula(
    tmp_path, bits, group_size, symmetric, act_order, format
):
    linear = make_linear(
        32, 64, bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order
    )
    stated = {"checkpoint_format": format, "desc_act": act_order}
    folder = _write(tmp_path / "c", linear, pack_gptq(linear, format=format), **stated)
    plan = make_plan(folder)
    spec, leaves = plan.specs["m"], load_params(plan)["m"]
    assert (spec.bits, spec.symmetric) == (8 if bits == 8 else 4, symmetric)
    assert (spec.in_features, spec.out_features) == (64, 32)
    assert ("perm" in leaves) == (act_order and group_size != -1)
    assert ("zero_point" in leaves) == (not symmetric)
    assert_same_bits(dequantize(leaves, spec), linear.floats)
    described = plan.describe_leaves()
    assert {f"m.{n}": (a.shape, a.dtype) for n, a in leaves.items()} == {
        n: (a.shape, a.dtype) for n, a in described.items()
    }


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
def test_the_leaves_are_those_of_the_same_numbers_in_compressed_tensors(tmp_path, bits, symmetric):
    linear = make_linear(64, 128, bits=bits, symmetric=symmetric, act_order=True)
    theirs = write_folder(
        tmp_path / "theirs",
        {"quantization_config": describe_pack_quantized(linear, symmetric=symmetric)},
        [prefix_names("m", convert_to_pack_quantized(linear, symmetric=symmetric))],
    )
    expected = load_params(make_plan(theirs))["m"]
    found = load_params(make_plan(_write(tmp_path / "c", linear, sym=symmetric)))["m"]
    assert found.keys() == expected.keys()
    jax.tree.map(assert_same_bits, found, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_that_borrowed_from_the_next_is_paid_back(tmp_path, bits):
    linear = make_linear(32, 64, bits=bits, lowest_zero=0)
    linear.zeros[3:6, 0] = 0  # three that follow each other, and the last of a word
    linear.zeros[31, 1] = 0
    folder = _write(
        tmp_path / "c",
        linear,
        pack_gptqmodel(linear),
        sym=False,
        checkpoint_format="gptq",
        meta={"quantizer": ["optimum:1.24.0", "gptqmodel:1.4.2"]},
    )
    assert_same_bits(_load(folder), linear.floats)


def test_three_bits_of_gptqmodel_are_read_from_the_version_on_that_can_write_them(tmp_path):
    linear = make_linear(32, 64, bits=3, lowest_zero=0)
    linear.zeros[3:6, 0] = 0
    tensors = pack_gptqmodel(linear)
    sound = _write(tmp_path / "a", linear, tensors, meta={"quantizer": "gptqmodel:7.0.0"})
    assert_same_bits(_load(sound), linear.floats)
    [fault] = list_faults(
        _write(tmp_path / "b", linear, tensors, meta={"quantizer": ["gptqmodel:6.0.3"]})
    )
    assert fault.tensor == "quantization_config.bits"
    assert "GPTQModel before 7.0" in fault.what


@pytest.mark.parametrize("bits", [3, 4])
def test_a_zero_point_that_tools_disagree_on_is_refused(tmp_path, bits):
    linear = make_linear(32, 64, bits=bits)
    linear.zeros[5, 1] = 0  # AutoGPTQ's kernels read it as 2^bits, others as 0
    top = 2**bits - 1
    [fault] = list_faults(_write(tmp_path / "c", linear))
    assert fault.tensor == "m.qzeros"
    assert f"stored as {top} as {top + 1} or as 0; 1 of 64, the first at [1, 5]" in fault.what
    # the other format has a place for it
    tensors = pack_gptq(linear, format="gptq_v2")
    assert_same_bits(
        _load(_write(tmp_path / "d", linear, tensors, checkpoint_format="gptq_v2")), linear.floats
    )


def test_symmetric_zero_points_that_are_something_else_are_refused(tmp_path):
    linear = make_linear(32, 64, symmetric=True)
    linear.zeros[2, 1] = 9
    [fault] = list_faults(_write(tmp_path / "c", linear, sym=True))
    assert fault.tensor == "m.qzeros"
    assert fault.what.endswith("stored as 7, but 1 of 64, the first at [1, 2]: 8")
    assert '"sym": false' in fault.way_out
    assert_same_bits(_load(_write(tmp_path / "d", linear, sym=False)), linear.floats)


def test_symmetric_zero_points_of_the_other_format_mean_the_same_and_are_told(tmp_path):
    # published so: zero points of 8 under checkpoint_format "gptq" (vllm-project/vllm#38966)
    linear = make_linear(32, 64, symmetric=True)
    folder = _write(
        tmp_path / "c", linear, pack_gptq(linear, format="gptq_v2"), checkpoint_format="gptq"
    )
    assert_same_bits(_load(folder), linear.floats)
    [warning] = _list_warnings(folder)
    assert warning.startswith("m.qzeros: all are stored as 8, as in format gptq_v2")
    assert _list_warnings(_write(tmp_path / "d", linear)) == []
    # the other way round, nobody has written any
    faults = list_faults(_write(tmp_path / "e", linear, checkpoint_format="gptq_v2"))
    assert "stored as 8, but 64 of 64" in faults[0].what


@pytest.mark.parametrize("act_order", [False, True])
def test_the_last_group_may_be_short(tmp_path, act_order):
    linear = make_linear(32, 72, group_size=32, act_order=act_order)
    folder = _write(tmp_path / "c", linear)
    plan = make_plan(folder)
    # gcd(32, 72): no kernel has groups of two sizes
    assert (plan.quantized["m"].group_size, plan.specs["m"].group_size) == (32, 8)
    assert_same_bits(_load(folder), linear.floats)
    [warning] = plan.warnings
    assert warning.startswith("m: 72 input features are no multiple of group_size = 32")
    # floor(72 / 32) scales are none for the last 8
    tensors = pack_gptq(linear)
    tensors |= {name: tensors[name][:2].copy() for name in ("scales", "qzeros")}
    names = {fault.tensor for fault in list_faults(_write(tmp_path / "d", linear, tensors))}
    assert names == {"m.scales", "m.qzeros"}


def test_features_that_are_dealt_out_otherwise_than_to_a_short_last_group_are_refused(tmp_path):
    linear = make_linear(32, 80, group_size=32, act_order=True)
    wrong = dataclasses.replace(linear, groups=2 - linear.groups)  # the first one is short
    folder = _write(tmp_path / "c", linear, pack_gptq(wrong), desc_act=True)
    [fault] = list_faults(folder)
    assert fault.tensor == "m.g_idx"
    assert fault.what == "group 0 has 16 input features, expected 32"


def test_what_a_config_leaves_out_is_taken_from_the_tensors(tmp_path):
    linear = make_linear(32, 64, symmetric=True, act_order=True)
    folder = _write(tmp_path / "c", linear, sym=None, desc_act=None)
    assert not make_plan(folder).specs["m"].symmetric
    assert_same_bits(_load(folder), linear.floats)


def test_groups_out_of_order_without_desc_act_are_refused(tmp_path):
    linear = make_linear(32, 64, act_order=True)
    [fault] = list_faults(_write(tmp_path / "c", linear, desc_act=False))
    assert fault.tensor == "m.g_idx"
    assert "in another group than their order says" in fault.what
    assert '"desc_act": true' in fault.way_out
    assert check_scales(make_plan(tmp_path / "c")) == [fault]  # what dequantize asks


@pytest.mark.parametrize(
    ("groups", "what"),
    [
        (np.full(64, -1), "64 of 64 input features are in no group of 2"),
        (np.arange(64) // 32 + 1, "32 of 64 input features are in no group of 2"),
        (np.arange(64) // 33, "group 0 has 33 input features"),
    ],
)
def test_groups_that_do_not_exist_are_refused(tmp_path, groups, what):
    linear = make_linear(32, 64)
    tensors = pack_gptq(linear) | {"g_idx": groups.astype(np.int32)}
    [fault] = list_faults(_write(tmp_path / "c", linear, tensors, desc_act=True))
    assert fault.tensor == "m.g_idx" and what in fault.what


def test_a_file_without_groups_is_in_column_order(tmp_path):
    linear = make_linear(32, 64)
    tensors = pack_gptq(linear)
    del tensors["g_idx"]
    assert_same_bits(_load(_write(tmp_path / "c", linear, tensors)), linear.floats)
    [fault] = list_faults(_write(tmp_path / "d", linear, tensors, desc_act=True))
    assert (fault.tensor, fault.what) == ("m.g_idx", "the tensor is missing")


@pytest.mark.parametrize("scale", [np.nan, np.inf, 0.0])
def test_a_scale_that_is_no_number_is_refused(tmp_path, scale):
    linear = make_linear(32, 64, symmetric=True)
    assert (linear.scales < 0).any()  # as AutoRound's
    linear.scales[3, 1] = scale
    [fault] = list_faults(_write(tmp_path / "c", linear))
    assert fault.tensor == "m.scales"
    assert "1 of 64 scales are zero or not finite, the first at [1, 3]" in fault.what


def test_all_that_is_wrong_with_the_tensors_is_named_as_the_file_names_it(tmp_path):
    linear = make_linear(32, 64)
    tensors = pack_gptq(linear)
    tensors["scales"] = tensors["scales"][:, :16].copy()
    tensors["weight"] = np.zeros((32, 64), np.float32)
    tensors["bias"] = np.zeros(16, np.float16)
    tensors["g_idx"] = tensors["g_idx"].astype(np.int64)
    del tensors["qzeros"]
    faults = {
        fault.tensor: fault.what for fault in list_faults(_write(tmp_path / "c", linear, tensors))
    }
    assert faults == {
        "m.qzeros": "the tensor is missing",
        "m.scales": "expected float16 or bfloat16 or float32 [2, 32], found float16 [2, 16]",
        "m.weight": "the tensor is not expected",
        "m.bias": "expected float16 or bfloat16 or float32 [32], found float16 [16]",
        "m.g_idx": "expected int32 [64], found int64 [64]",
    }


@pytest.mark.parametrize(
    ("words", "bits", "what"),
    [
        (np.zeros((8, 30), np.int32), 4, "zero points of 30 output features do not fill"),
        (np.zeros((7, 32), np.int32), 3, "7 words hold no whole number of 3-bit values"),
        (np.zeros((2, 8, 32), np.int32), 4, r"expected int32 [K * 4 / 32, N], found int32 [2, 8"),
        (np.zeros((8, 32), np.float32), 4, r"expected int32 [K * 4 / 32, N], found float32"),
    ],
)
def test_words_that_hold_no_weight_are_refused(tmp_path, words, bits, what):
    linear = make_linear(32, 64)
    tensors = pack_gptq(linear) | {"qweight": words}
    faults = list_faults(_write(tmp_path / "c", linear, tensors, bits=bits))
    assert faults[0].tensor == "m.qweight"
    assert what in faults[0].what


def test_more_bits_than_the_config_says_are_refused(tmp_path):
    linear = make_linear(32, 64, bits=8)
    names = {fault.tensor for fault in list_faults(_write(tmp_path / "c", linear, bits=4))}
    assert names == {"m.scales", "m.qzeros", "m.g_idx"}


def test_tensors_of_another_tool_than_the_config_names_are_refused(tmp_path):
    linear = make_linear(32, 64)
    packed = convert_to_pack_quantized(linear)
    faults = list_faults(_write(tmp_path / "a", linear, packed))
    said = [fault.what for fault in faults if "is a tensor of compressed-tensors" in fault.what]
    assert len(said) == 1
    assert all(f"m.{role}" in said[0] for role in packed)
    tensors = [prefix_names("m", pack_gptq(linear))]
    for quantization, named in (
        (None, "quantization_config"),
        (describe_pack_quantized(linear), "m.qweight"),
    ):
        config = {"quantization_config": quantization}
        [fault] = list_faults(write_folder(tmp_path / named, config, tensors))
        assert fault.tensor == named
        assert "quantize_config.json" in fault.way_out


def _make_experts(first: Linear, second: Linear) -> dict[str, np.ndarray]:
    return {
        f"mlp.experts.{expert}.{name}.{end}": array
        for expert in range(2)
        for name in ("gate_proj", "up_proj", "down_proj")
        for end, array in pack_gptq(second if name == "down_proj" else first).items()
    }


def test_experts_become_the_stacks_of_the_same_numbers(tmp_path):
    # one group, whose order changes nothing, and two of which the last is short
    first, second = make_linear(40, 32, seed=1), make_linear(32, 40, seed=2)
    config = {"quantization_config": describe_gptq(second, desc_act=True)}
    plan = make_plan(write_folder(tmp_path / "c", config, [_make_experts(first, second)]))
    params = load_params(plan)["mlp"]["experts"]
    w13, w2 = (dequantize(params[n], plan.specs[f"mlp.experts.{n}"]) for n in ("w13", "w2"))
    for expert in range(2):
        assert_same_bits(w13[expert], np.concatenate([first.floats, first.floats]))
        assert_same_bits(w2[expert], second.floats)


def test_experts_whose_features_are_reordered_are_refused(tmp_path):
    first, second = make_linear(32, 64, act_order=True), make_linear(64, 32)
    config = {"quantization_config": describe_gptq(first)}
    [fault] = list_faults(write_folder(tmp_path / "c", config, [_make_experts(first, second)]))
    assert fault.tensor == "mlp.experts.0.gate_proj.g_idx"
    assert "act-order" in fault.what and "4 modules" in fault.what
