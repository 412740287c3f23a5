"""Experts whose integers lie as other versions, or other widths, lay them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs

from loaders.errors import CheckpointError
from loaders.plan import make_plan
from loaders.stream import load_params
from pallas_kernels.format.dequantize import dequantize
from pallas_kernels.format.spec import QuantSpec
from tests.checkpoints import assert_same_bits, compress, decompress, make_weight, to_numpy
from tests.folders import (
    describe_groups,
    describe_linears,
    make_config,
    make_tensors,
    prefix_names,
    write_folder,
)

EXPERTS, INNER, HIDDEN = 3, 40, 64
PATH = "model.layers.0.mlp.experts"
STARRED = "model.layers.*.mlp.experts.*.down_proj"
SHAPES = {
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}


def _compress_all(args: QuantizationArgs) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tensors of all experts by name, and the floats of w13 and w2."""
    tensors, floats = {}, {}
    for expert in range(EXPERTS):
        for i, (name, shape) in enumerate(SHAPES.items()):
            roles = compress(make_weight(shape, seed=10 * expert + i), args)
            arrays = {role: to_numpy(tensor) for role, tensor in roles.items()}
            tensors |= prefix_names(f"{PATH}.{expert}.{name}", arrays)
            floats[expert, name] = to_numpy(decompress(roles, args))
    rows = [[floats[e, "gate_proj"], floats[e, "up_proj"]] for e in range(EXPERTS)]
    stacks = {
        "w13": np.stack([np.concatenate(pair) for pair in rows]),
        "w2": np.stack([floats[e, "down_proj"] for e in range(EXPERTS)]),
    }
    return tensors, stacks


def _write(folder: Path, tensors: dict[str, np.ndarray], args: QuantizationArgs) -> Path:
    config = describe_linears(args.model_dump(mode="json"))
    return write_folder(folder, {"quantization_config": config, "num_experts": EXPERTS}, [tensors])


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_experts_of_any_width_are_stacked_exactly(tmp_path, bits):
    args = QuantizationArgs.model_validate(
        {"num_bits": bits, "symmetric": False, "strategy": "channel"}
    )
    tensors, expected = _compress_all(args)
    plan = make_plan(_write(tmp_path / "c", tensors, args))
    params = load_params(plan)["model"]["layers"]["0"]["mlp"]["experts"]
    for name, floats in expected.items():
        spec = plan.specs[f"{PATH}.{name}"]
        assert spec.bits == (4 if bits < 4 else 8)
        assert_same_bits(jax.jit(dequantize, static_argnums=1)(params[name], spec), floats)


def _make_four_bits() -> tuple[dict[str, np.ndarray], dict]:
    specs = [
        QuantSpec(bits=4, group_size=8, symmetric=False, in_features=k, out_features=n)
        for n, k in SHAPES.values()
    ]
    tensors = {
        name: array
        for expert in range(EXPERTS)
        for i, (projection, spec) in enumerate(zip(SHAPES, specs, strict=True))
        for name, array in prefix_names(
            f"{PATH}.{expert}.{projection}", make_tensors(spec, seed=10 * expert + i)
        ).items()
    }
    config = make_config(dataclasses.replace(specs[0], in_features=8, out_features=8))
    return tensors, config | {"num_experts": EXPERTS}


@pytest.mark.parametrize("in_order", ["all -1", "by number"])
def test_groups_of_experts_in_column_order_change_nothing(tmp_path, in_order):
    tensors, config = _make_four_bits()
    plain = load_params(make_plan(write_folder(tmp_path / "plain", config, [tensors])))
    indices = {
        f"{PATH}.{expert}.{name}.weight_g_idx": (
            np.full(k, -1, np.int32) if in_order == "all -1" else np.arange(k, dtype=np.int32) // 8
        )
        for expert in range(EXPERTS)
        for name, (_, k) in SHAPES.items()
    }
    found = load_params(make_plan(write_folder(tmp_path / "c", config, [tensors | indices])))
    assert jax.tree.structure(found) == jax.tree.structure(plain)
    jax.tree.map(assert_same_bits, found, plain)


def test_experts_whose_features_are_reordered_are_refused_once_with_a_way_out(tmp_path):
    tensors, config = _make_four_bits()
    groups = np.arange(INNER, dtype=np.int32)[::-1].copy() // 8
    names = [f"{PATH}.{expert}.down_proj.weight_g_idx" for expert in (1, 2)]
    reordered = tensors | dict.fromkeys(names, groups)
    plan = make_plan(write_folder(tmp_path / "c", config, [reordered]))
    with pytest.raises(CheckpointError) as caught:
        load_params(plan)
    [fault] = caught.value.faults
    assert fault.tensor == names[0]
    assert f"reordered (act-order), which no kernel supports: 2 modules, {STARRED}" in fault.what
    assert "`jaxwna16 dequantize`" in fault.way_out


def test_experts_packed_in_several_ways_are_the_floats_of_each(tmp_path):
    """One stays plain, one has 8 bits, one act-order: float32 holds the floats of all, exactly."""
    facts = {"symmetric": False, "strategy": "group", "group_size": 8}
    four = QuantizationArgs(num_bits=4, scale_dtype=torch.float16, **facts)
    eight = QuantizationArgs(num_bits=8, scale_dtype=torch.bfloat16, **facts)
    tensors, stacks = _compress_all(four)
    other = f"{PATH}.1.down_proj"
    roles = compress(make_weight(SHAPES["down_proj"], seed=90), eight)
    plain = to_numpy(make_weight(SHAPES["up_proj"], seed=91).bfloat16())
    tensors = {n: a for n, a in tensors.items() if not n.startswith((f"{PATH}.2.up_proj", other))}
    tensors |= prefix_names(other, {role: to_numpy(tensor) for role, tensor in roles.items()})
    tensors[f"{PATH}.2.up_proj.weight"] = plain
    wide = {name: floats.astype(np.float32) for name, floats in stacks.items()}
    wide["w2"][1], wide["w13"][2, INNER:] = to_numpy(decompress(roles, eight)), plain
    # of down_proj 0, columns are in another order than the groups of their scales
    order = np.random.default_rng(0).permutation(INNER)
    moved, words = (
        f"{PATH}.0.down_proj",
        torch.from_numpy(tensors[f"{PATH}.0.down_proj.weight_packed"]),
    )
    codes = unpack_from_int32(words, 4, torch.Size(SHAPES["down_proj"]))[:, order]
    tensors[f"{moved}.weight_packed"] = to_numpy(pack_to_int32(codes.contiguous(), 4))
    tensors[f"{moved}.weight_g_idx"] = (order // 8).astype(np.int32)
    wide["w2"][0] = wide["w2"][0][:, order]
    groups = {
        name: {"targets": targets, "weights": args.model_dump(mode="json")}
        for name, targets, args in (("rest", ["Linear"], four), ("own", [other], eight))
    }
    config = {"quantization_config": describe_groups(groups), "num_experts": EXPERTS}
    plan = make_plan(write_folder(tmp_path / "c", config, [tensors]))
    params = load_params(plan)["model"]["layers"]["0"]["mlp"]["experts"]
    for name, floats in wide.items():
        assert_same_bits(params[name]["weight"], floats)
    described = plan.describe_leaves()
    assert described[f"{PATH}.w2.weight"].dtype == np.float32
    assert described[f"{PATH}.w13.weight"].shape == wide["w13"].shape
