"""Weights in other quantized numbers are one fault that names their modules, never plain floats."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from loaders.errors import CheckpointError
from loaders.plan import make_plan
from pallas_kernels.format.spec import QuantSpec
from tests.folders import make_config, make_tensors, prefix_names, write_folder

SPEC = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=64, out_features=64)
HEADS = [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"]
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
KINDS = {
    "block": ({"weight": (E4M3, 64), "weight_scale_inv": (np.float32, 1)}, "FP8"),
    "tensor": ({"weight": (E5M2, 64), "weight_scale": (np.float32, 1)}, "FP8"),
    "no scale in sight": ({"weight": (E4M3, 64)}, "FP8"),
    "int8": ({"weight": (np.int8, 64), "weight_scale": (np.float32, 1)}, "int8"),
    "bitsandbytes": ({"weight": (np.int8, 64), "SCB": (np.float32, 1)}, "int8"),
    "modelopt": (
        {"weight": (np.uint8, 32), "weight_scale": (E4M3, 4), "weight_scale_2": (np.float32, 1)},
        "uint8",
    ),
    "nvfp4": (
        {
            "weight_packed": (np.uint8, 32),
            "weight_scale": (E4M3, 4),
            "weight_global_scale": (np.float32, 1),
        },
        "FP4",
    ),
    "mxfp4": ({"weight_packed": (np.uint8, 32), "weight_scale": (np.uint8, 2)}, "FP4"),
    "blocks": ({"proj_blocks": (np.uint8, 32), "proj_scales": (np.uint8, 2)}, "FP4"),
}
"""Name -> dtype and columns of each tensor, and what the fault calls them."""


def make_module(roles) -> dict[str, np.ndarray]:
    return {role: np.ones((64, n), dtype) for role, (dtype, n) in roles.items()}


def write(folder, roles, *, gptq: bool = False, packed: bool = True) -> Path:
    tensors = {"model.norm.weight": np.ones(64, np.float32)}
    tensors |= prefix_names("model.layers.0.mlp.up_proj", make_tensors(SPEC)) if packed else {}
    for path in HEADS:
        tensors |= prefix_names(path, make_module(roles))
    config = make_config(SPEC, ignore=["re:.*self_attn"]) if packed else {}
    if gptq:
        gptq_config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
        config = {"quantization_config": gptq_config | {"desc_act": False}}
        tensors = {name: array for name, array in tensors.items() if "up_proj" not in name}
    return write_folder(folder, config, [tensors])


@pytest.mark.parametrize("gptq", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_one_fault_that_names_the_modules(tmp_path, kind, gptq):
    roles, name = KINDS[kind]
    with pytest.raises(CheckpointError) as caught:
        make_plan(write(tmp_path / "c", roles, gptq=gptq))
    [fault] = caught.value.faults
    assert fault.what.startswith(f"{name} weights")
    assert "8 modules, model.layers.*.self_attn." in fault.what
    assert fault.file == "model.safetensors" and fault.tensor in HEADS and fault.way_out


@pytest.mark.parametrize("kind", ["block", "tensor", "int8", "nvfp4"])
def test_scales_tell_where_the_config_says_nothing(tmp_path, kind):
    with pytest.raises(CheckpointError, match="only packed integers are read: 8 modules"):
        make_plan(write(tmp_path / "c", KINDS[kind][0], packed=False))


def test_without_a_scale_in_a_plain_checkpoint_they_are_what_they_are(tmp_path):
    for name, dtype in {"floats": E4M3, "integers": np.int8}.items():
        plan = make_plan(write(tmp_path / name, {"weight": (dtype, 64)}, packed=False))
        assert {f"{path}.weight" for path in HEADS} < plan.plain.keys()


def test_stacked_experts_in_fp8_are_found_and_not_said_to_be_missing(tmp_path):
    path = "model.layers.0.mlp.experts"
    tensors = prefix_names("model.layers.0.self_attn.q_proj", make_tensors(SPEC))
    for name, shape in {"gate_up_proj": (3, 64, 64), "down_proj": (3, 64, 32)}.items():
        tensors[f"{path}.{name}"] = np.ones(shape, E4M3)
        tensors[f"{path}.{name}_scale_inv"] = np.ones((3, 1, 1), np.float32)
    config = make_config(SPEC, ignore=["re:.*experts"]) | {"num_experts": 3}
    with pytest.raises(CheckpointError) as caught:
        make_plan(write_folder(tmp_path / "c", config, [tensors]))
    [fault] = caught.value.faults
    assert "FP8 weights" in fault.what and f"{path.replace('0', '*')}.gate_up_proj" in fault.what
