"""Checkpoints of AutoAWQ load exactly, as compressed-tensors' own converter turns them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from safetensors.torch import save_file

from loaders.plan import make_plan
from loaders.stream import load_params
from pallas_kernels.format.dequantize import dequantize
from tests.awq_gptq import (
    AWQ_ORDER,
    Linear,
    describe_awq,
    list_faults,
    make_linear,
    pack_awq,
)
from tests.checkpoints import assert_same_bits
from tests.folders import prefix_names, write_folder
from tests.grids import sample


def _write(folder: Path, linear: Linear, tensors: dict | None = None, **changes: Any) -> Path:
    config = {"quantization_config": describe_awq(linear, **changes)}
    tensors = pack_awq(linear) if tensors is None else tensors
    return write_folder(folder, config, [prefix_names("m", tensors)])


def test_the_order_of_a_word_is_the_documented_one():
    linear = make_linear(8, 8, group_size=-1)
    [word] = pack_awq(linear)["qweight"].view(np.uint32)[0]
    assert [int(word) >> (4 * i) & 15 for i in range(8)] == linear.codes[
        list(AWQ_ORDER), 0
    ].tolist()


@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    # of the 40 input features of one, the last 8 are a short group
    sample([(8, 64, 32), (72, 96, -1), (64, 256, 128), (24, 8, 4), (16, 40, 32)], every=2),
)
def test_the_weight_is_the_documented_formula(tmp_path, n, k, group_size):
    linear = make_linear(n, k, group_size=group_size, lowest_zero=0)
    plan = make_plan(_write(tmp_path / "c", linear))
    spec = plan.specs["m"]
    assert (spec.bits, spec.symmetric, spec.out_features, spec.in_features) == (4, False, n, k)
    assert_same_bits(dequantize(load_params(plan)["m"], spec), linear.floats)


@pytest.mark.parametrize("zero_point", [True, False])
def test_leaves_equal_those_of_what_compressed_tensors_converts(tmp_path, zero_point):
    linear = make_linear(72, 128, symmetric=not zero_point)
    linear.scales[:] = np.abs(linear.scales)
    folder = _write(tmp_path / "c", linear, zero_point=zero_point)
    config = describe_awq(linear, zero_point=zero_point)
    converter = AutoAWQConverter.from_autoawq_config(config)
    tensors = {f"m.{end}": torch.from_numpy(a) for end, a in pack_awq(linear).items()}
    converted = tmp_path / "converted"
    described = converter.update_config(None)
    assert described is not None
    quantization = {
        "quantization_config": described.model_dump(mode="json") | {"version": "0.20.0"}
    }
    write_folder(converted, quantization, [{}])
    save_file(converter.process(tensors), converted / "model.safetensors")
    expected = make_plan(converted)
    plan = make_plan(folder)
    assert plan.specs == expected.specs
    found, wanted = load_params(plan)["m"], load_params(expected)["m"]
    assert found.keys() == wanted.keys()
    jax.tree.map(assert_same_bits, found, wanted)


def test_without_zero_points_there_may_be_none_or_only_eights(tmp_path):
    linear = make_linear(16, 64, symmetric=True)
    tensors = pack_awq(linear)
    linear.zeros[4, 0] = 7
    faults = list_faults(_write(tmp_path / "a", linear, zero_point=False))
    assert [fault.tensor for fault in faults] == ["m.qzeros"]
    assert faults[0].what.endswith("stored as 8, but 1 of 32, the first at [0, 4]: 7")
    assert '"zero_point": true' in faults[0].way_out
    linear.zeros[4, 0] = 8
    del tensors["qzeros"]
    # as GPTQModel says it
    for i, said in enumerate([{"zero_point": False}, {"zero_point": None, "sym": True}]):
        plan = make_plan(_write(tmp_path / f"b{i}", linear, tensors, **said))
        assert_same_bits(dequantize(load_params(plan)["m"], plan.specs["m"]), linear.floats)
    [fault] = list_faults(_write(tmp_path / "c", linear, tensors, zero_point=True))
    assert (fault.tensor, fault.what) == ("m.qzeros", "the tensor is missing")


def test_all_that_is_wrong_with_the_tensors_is_named_as_the_file_names_it(tmp_path):
    linear = make_linear(16, 64)
    tensors = pack_awq(linear) | {"g_idx": linear.groups}
    tensors["qzeros"] = tensors["qzeros"][:1].copy()
    del tensors["scales"]
    found = list_faults(_write(tmp_path / "c", linear, tensors))
    assert {fault.tensor: fault.what for fault in found} == {
        "m.scales": "the tensor is missing",
        "m.g_idx": "the tensor is not expected",
        "m.qzeros": "expected int32 [2, 2], found int32 [1, 2]",
    }


def test_words_of_gptq_under_the_name_of_awq_are_refused(tmp_path):
    linear = make_linear(16, 64)
    tensors = pack_awq(linear) | {"qweight": np.zeros((32, 16), np.int32)}
    # which could be a weight of 32 features, but for the others
    faults = list_faults(_write(tmp_path / "c", linear, tensors))
    assert {fault.tensor for fault in faults} == {"m.qzeros", "m.scales"}
    stacked = pack_awq(linear) | {"qweight": np.zeros((2, 64, 2), np.int32)}
    [fault] = list_faults(_write(tmp_path / "d", linear, stacked))
    assert fault.what == "expected int32 [K, N / 8], found int32 [2, 64, 2]"


def test_experts_become_the_stacks_of_the_same_numbers(tmp_path):
    first, second = make_linear(32, 64, seed=1), make_linear(64, 32, seed=2)
    tensors = {
        f"mlp.experts.{expert}.{name}.{end}": array
        for expert in range(2)
        for name in ("gate_proj", "up_proj", "down_proj")
        for end, array in pack_awq(second if name == "down_proj" else first).items()
    }
    config = {"quantization_config": describe_awq(first)}
    plan = make_plan(write_folder(tmp_path / "c", config, [tensors]))
    params = load_params(plan)["mlp"]["experts"]
    for name, floats in {
        "w13": np.concatenate([first.floats] * 2),
        "w2": second.floats,
    }.items():
        for expert in dequantize(params[name], plan.specs[f"mlp.experts.{name}"]):
            assert_same_bits(expert, floats)
