"""Checkpoints that hold all experts of a layer in one tensor, in their several spellings."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch

from loaders.errors import CheckpointError
from loaders.modules.repack import pack
from loaders.plan import make_plan
from loaders.stream import load_params
from pallas_kernels.format.dequantize import dequantize
from pallas_kernels.format.spec import QuantSpec
from tests.checkpoints import (
    assert_same_bits,
    compress,
    decompress,
    make_args,
    make_weight,
    to_numpy,
)
from tests.folders import make_config, make_experts, write_bit_stream, write_folder

EXPERTS, HIDDEN, INNER = 3, 64, 40
PATH = "model.layers.0.mlp.experts"


def make_specs(bits, group, symmetric, inner=INNER) -> tuple[QuantSpec, QuantSpec]:
    """Of w13 and w2; the group of w2 is its whole row if `group` does not divide it."""
    second = group if inner % group == 0 else -1
    return (
        QuantSpec(
            bits=bits,
            group_size=group,
            symmetric=symmetric,
            in_features=HIDDEN,
            out_features=2 * inner,
        ),
        QuantSpec(
            bits=bits,
            group_size=second,
            symmetric=symmetric,
            in_features=inner,
            out_features=HIDDEN,
        ),
    )


def describe(first, second):
    """The config of both specs."""
    return make_config(first, second, targets=[["Linear"], [r"re:.*(down_proj|w2)$"]])


def compress_experts(first, second) -> dict[str, dict[str, torch.Tensor]]:
    """Projection -> role -> tensor, as compressed-tensors compresses a stacked weight."""
    return {
        name: compress(
            make_weight((EXPERTS, spec.out_features, spec.in_features), seed),
            make_args(spec, "bfloat16"),
        )
        for name, spec, seed in (("gate_up_proj", first, 1), ("down_proj", second, 2))
    }


def name_tensors(projections, path=PATH, broken=False) -> dict[str, np.ndarray]:
    """Arrays by full names; in the broken spelling "….gate_up_proj_packed"."""
    return {
        f"{path}.{name}" + (role.replace("weight", "") if broken else f".{role}"): (
            to_numpy(tensor) if isinstance(tensor, torch.Tensor) else tensor
        )
        for name, tensors in projections.items()
        for role, tensor in tensors.items()
    }


def load(folder):
    """The tree of the experts."""
    return load_params(make_plan(folder))["model"]["layers"]["0"]["mlp"]["experts"]


def list_faults(folder) -> list[tuple[str, str, str]]:
    with pytest.raises(CheckpointError) as caught:
        make_plan(folder)
    return [(fault.tensor, fault.what, fault.way_out) for fault in caught.value.faults]


def _assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(assert_same_bits, first, second)


SCHEMES = [(4, 32, True), (4, 32, False), (4, 64, False), (8, 64, True), (8, 8, False)]


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_expert_of_a_stacked_module_has_the_bits_of_compressed_tensors(
    tmp_path, scheme, broken
):
    specs = make_specs(*scheme)
    projections = compress_experts(*specs)
    folder = write_folder(
        tmp_path / "c", describe(*specs), [name_tensors(projections, broken=broken)]
    )
    plan = make_plan(folder)
    assert plan.specs == {f"{PATH}.w13": specs[0], f"{PATH}.w2": specs[1]}
    assert plan.nbytes == sum(
        a.nbytes for tensors in projections.values() for a in tensors.values()
    )
    assert len(plan.quantized) == 2 * EXPERTS
    experts = load(folder)
    assert experts.keys() == {"w13", "w2"}
    for spec, stack, tensors in zip(specs, ("w13", "w2"), projections.values(), strict=True):
        dense = decompress(tensors, make_args(spec, "bfloat16"))
        for expert in range(EXPERTS):
            own = {r: to_numpy(t[expert]) for r, t in tensors.items() if r != "weight_shape"}
            found = {leaf: array[expert] for leaf, array in experts[stack].items()}
            _assert_same(found, pack(own, spec))
            assert_same_bits(dequantize(found, spec), dense[expert])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_experts_merged_after_they_were_packed_are_those_that_were_separate(tmp_path, scheme):
    """As a tool does that knows neither `weight_shape` nor zero points: rows behind rows."""
    first, second = make_specs(*scheme)
    half = dataclasses.replace(first, out_features=INNER)
    names = ("gate_proj", "up_proj", "down_proj")
    separate = make_experts(PATH, half, second, names=names, experts=EXPERTS)
    merged: dict[str, dict[str, np.ndarray]] = {"gate_up_proj": {}, "down_proj": {}}
    for role in {name.rpartition(".")[2] for name in separate}:
        held = {
            name: np.stack([separate[f"{PATH}.{e}.{name}.{role}"] for e in range(EXPERTS)])
            for name in names
            if f"{PATH}.0.{name}.{role}" in separate
        }
        merged["gate_up_proj"][role] = np.concatenate([held[n] for n in names[:2]], axis=1)
        merged["down_proj"][role] = held["down_proj"]
    assert merged["gate_up_proj"]["weight_shape"].shape == (EXPERTS, 4)
    folders = [
        write_folder(tmp_path / name, describe(first, second), [tensors])
        for name, tensors in {
            "a": separate,
            "b": name_tensors(merged),
            "c": name_tensors(merged, broken=True),
        }.items()
    ]
    for folder in folders[1:]:
        _assert_same(load(folder), load(folders[0]))


@pytest.mark.parametrize("inner", range(29, 37))
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_are_read_where_their_packing_is_certain(tmp_path, bits, inner):
    """Packed along all 2I rows; the same bytes as those of gate and up one after the other?"""
    first, second = make_specs(bits, HIDDEN, False, inner)
    projections = compress_experts(first, second)
    folder = write_folder(tmp_path / "c", describe(first, second), [name_tensors(projections)])
    joint = -(-2 * inner * bits // 32)
    separate = 2 * -(-inner * bits // 32)
    if inner * bits % 32 and joint == separate:
        [(name, what, way_out)] = list_faults(folder)
        assert name == f"{PATH}.gate_up_proj.weight_zero_point"
        assert f"{inner} gate and {inner} up features" in what
        assert "one by one" in way_out
        return
    found = load(folder)["w13"]["zero_point"]
    for expert in range(EXPERTS):
        words = to_numpy(projections["gate_up_proj"]["weight_zero_point"][expert])
        codes = np.asarray(found[expert])[:, : 2 * inner].astype(np.int64) + first.offset
        np.testing.assert_array_equal(write_bit_stream(codes, bits).T, words)


def _change(projections, projection, role, array):
    return projections | {projection: projections[projection] | {role: array}}


SPECS = make_specs(4, 32, False)
GOOD = compress_experts(*SPECS)


@pytest.mark.parametrize(
    ("projection", "role", "array", "what"),
    [
        ("down_proj", "weight_scale", np.ones((2, 64, 1), np.float32), "expected 3 experts"),
        ("down_proj", "weight_shape", np.array([64, 40]), "expected int64 [3] of [3, N, K]"),
        ("down_proj", "weight_shape", np.array([4, 64, 40]), "found int64 [3] of [4, 64, 40]"),
        ("down_proj", "weight_shape", np.array([[64, 40], [64, 40], [64, 8]]), "expected int64"),
        ("gate_up_proj", "weight_shape", np.array([[40, 64, 48, 64]] * 3), "expected int64"),
        ("gate_up_proj", "weight_shape", np.zeros((1000, 9), np.int64), "expected int64 [3]"),
        ("down_proj", "weight_shape", np.array([3.0, 64, 40]), "expected int64 [3]"),
        (
            "gate_up_proj",
            "weight_packed",
            np.zeros((3, 80, 9), np.int32),
            "expected int32 [80, 8], found int32 [80, 9]",
        ),
        (
            # as one would pack along the first axis of three
            "gate_up_proj",
            "weight_zero_point",
            np.zeros((1, 80, 2), np.int32),
            "expected 3 experts, found int32 [1, 80, 2]",
        ),
        (
            "gate_up_proj",
            "weight_zero_point",
            np.zeros((3, 80, 2), np.uint8),
            "expected int32 [10, 2], found uint8 [80, 2]",
        ),
        ("down_proj", "weight_packed", np.zeros((0, 64, 5), np.int32), "at least one expert"),
        ("down_proj", "weight_packed", np.zeros((3, 0, 5), np.int32), "at least one expert"),
    ],
)
def test_one_wrong_stacked_tensor_is_named_once(tmp_path, projection, role, array, what):
    tensors = name_tensors(_change(GOOD, projection, role, array))
    faults = list_faults(write_folder(tmp_path / "c", describe(*SPECS), [tensors]))
    assert len(faults) == 1 or role == "weight_packed"
    name, found, _ = faults[0]
    assert name.removesuffix("[0]") == f"{PATH}.{projection}.{role}"
    assert what in found


def test_missing_tensor_of_a_stacked_module_is_named(tmp_path):
    tensors = name_tensors(GOOD, broken=True)
    del tensors[f"{PATH}.down_proj_scale"]
    [(name, what, way_out)] = list_faults(write_folder(tmp_path / "c", describe(*SPECS), [tensors]))
    assert name == f"{PATH}.down_proj[0].weight_scale"
    assert what == "the tensor is missing"
    assert "one by one" in way_out


def test_one_tensor_in_both_spellings_is_refused(tmp_path):
    again = {f"{PATH}.down_proj_packed": to_numpy(GOOD["down_proj"]["weight_packed"])}
    faults = list_faults(
        write_folder(tmp_path / "c", describe(*SPECS), [name_tensors(GOOD) | again])
    )
    names = {f"{PATH}.down_proj_packed", f"{PATH}.down_proj.weight_packed"}
    assert {faults[0][0], faults[0][1].removeprefix("is also there as ")} == names


def test_stacked_layers_and_separate_ones_stand_side_by_side(tmp_path):
    """As where the layers for speculation beside a stacked model keep separate experts."""
    half = dataclasses.replace(SPECS[0], out_features=INNER)
    names = ("gate_proj", "up_proj", "down_proj")
    extra = make_experts("mtp.layers.0.mlp.experts", half, SPECS[1], names=names, experts=EXPERTS)
    config = describe(*SPECS) | {"num_experts": EXPERTS}
    plan = make_plan(write_folder(tmp_path / "c", config, [name_tensors(GOOD) | extra]))
    assert plan.specs == {
        f"{path}.{stack}": spec
        for path in (PATH, "mtp.layers.0.mlp.experts")
        for stack, spec in zip(("w13", "w2"), SPECS, strict=True)
    }
    params = load_params(plan)
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes["mtp"]["layers"]["0"]["mlp"] == shapes["model"]["layers"]["0"]["mlp"]


def test_stacked_experts_that_are_too_few_are_missing(tmp_path):
    config = describe(*SPECS) | {"num_local_experts": 5}
    faults = list_faults(write_folder(tmp_path / "c", config, [name_tensors(GOOD)]))
    assert [fault[:2] for fault in faults] == [(PATH, "2 of 5 experts are missing: 3-4")]


def _make_floats(**shapes) -> dict[str, np.ndarray]:
    return {f"{PATH}.{name}": make_weight(shape).numpy() for name, shape in shapes.items()}


def test_stacked_floats_are_the_leaves_themselves(tmp_path):
    floats = _make_floats(gate_up_proj=(3, 80, 64), down_proj=(3, 64, 40))
    floats |= _make_floats(gate_up_proj_bias=(3, 80), down_proj_bias=(3, 64))
    folder = write_folder(tmp_path / "c", {"num_experts": 3}, [floats])
    expected = {
        "w13": {
            "weight": floats[f"{PATH}.gate_up_proj"],
            "bias": floats[f"{PATH}.gate_up_proj_bias"],
        },
        "w2": {"weight": floats[f"{PATH}.down_proj"], "bias": floats[f"{PATH}.down_proj_bias"]},
    }
    _assert_same(load(folder), expected)
    assert make_plan(folder).nbytes == sum(array.nbytes for array in floats.values())


def test_stacked_floats_without_a_gate_are_up_and_down(tmp_path):
    floats = _make_floats(up_proj=(3, 40, 64), down_proj=(3, 64, 40))
    experts = load(write_folder(tmp_path / "c", {}, [floats]))
    assert experts["w13"]["weight"].shape == (3, 40, 64)


def test_transposed_floats_are_refused_with_a_way_out(tmp_path):
    """As gpt-oss, Llama 4 and Qwen3-VL have them."""
    floats = _make_floats(gate_up_proj=(3, 64, 80), down_proj=(3, 40, 64))
    [(name, what, way_out)] = list_faults(write_folder(tmp_path / "c", {}, [floats]))
    assert name == PATH
    assert what == "expected [2I, H] and [H, I] in each expert, found [64, 80] and [40, 64]"
    assert "one by one" in way_out


def test_biases_of_another_number_of_experts_are_refused(tmp_path):
    floats = _make_floats(gate_up_proj=(3, 80, 64), down_proj=(3, 64, 40), down_proj_bias=(2, 64))
    [(name, what, _)] = list_faults(write_folder(tmp_path / "c", {}, [floats]))
    assert name == f"{PATH}.down_proj_bias"
    assert what == "expected 3 experts, found float32 [2, 64]"


GRANITE = {"gate_up_proj": "input_linear", "down_proj": "output_linear"}
BLOCK = "model.layers.0.block_sparse_moe"


def _load_block(folder) -> dict:
    return load_params(make_plan(folder))["model"]["layers"]["0"]["block_sparse_moe"]


def test_packed_stacks_of_granite_are_those_of_joint_projections(tmp_path):
    named = {GRANITE[name]: tensors for name, tensors in GOOD.items()}
    config = make_config(*SPECS, targets=[["Linear"], [r"re:.*(down_proj|output_linear)$"]])
    folder = write_folder(tmp_path / "c", config, [name_tensors(named, BLOCK)])
    assert make_plan(folder).specs.keys() == {f"{BLOCK}.w13", f"{BLOCK}.w2"}
    usual = write_folder(tmp_path / "d", describe(*SPECS), [name_tensors(GOOD)])
    _assert_same(_load_block(folder), load(usual))


def test_floats_of_granite_are_the_leaves_and_what_is_missing_is_named(tmp_path):
    first, second = (f"{BLOCK}.{name}.weight" for name in GRANITE.values())
    floats = {first: make_weight((3, 80, 64)).numpy(), second: make_weight((3, 64, 40)).numpy()}
    loaded = _load_block(write_folder(tmp_path / "c", {"num_local_experts": 3}, [floats]))
    _assert_same(loaded, {"w13": {"weight": floats[first]}, "w2": {"weight": floats[second]}})
    del floats[second]
    faults = list_faults(write_folder(tmp_path / "d", {}, [floats]))
    assert [fault[:2] for fault in faults] == [
        (BLOCK, "output_linear is missing in experts 0-2"),
    ]


def test_three_axes_under_another_name_are_a_tensor_like_any_other(tmp_path):
    floats = {
        "conv.experts.gate_up_proj.weight": np.zeros((3, 4, 5), np.float32),
        "block.input_linear.weight": np.zeros((3, 4, 5), np.float32),
    }
    plan = make_plan(write_folder(tmp_path / "c", {}, [floats]))
    assert plan.plain.keys() == floats.keys()
    packed = name_tensors({"input_linear": GOOD["down_proj"]}, "block")
    [(name, what, _)] = list_faults(write_folder(tmp_path / "d", describe(*SPECS), [packed]))
    assert (name, what) == (
        "block.input_linear.weight_shape",
        "expected int64 [2], found int64 [3]",
    )
