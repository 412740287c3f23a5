"""Scales of a quantized key-value cache are told by their names, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loaders.errors import CheckpointError
from loaders.files.safetensors_file import TensorInfo
from loaders.modules.kv_cache import split_cache_scales
from loaders.plan import make_plan
from pallas_kernels.format.spec import QuantSpec
from tests.folders import make_config, make_tensors, prefix_names, write_folder

ATTENTION = "model.layers.0.self_attn"
SPEC = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=64, out_features=64)
SCALES = [
    *("self_attn.k_scale", "self_attn.v_scale", "self_attn.q_scale", "attention.k_scale"),
    *("self_attn.k_zero_point", "self_attn.v_zero_point", "self_attn.k_global_scale"),
    *("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    *("self_attn.v_proj.output_zero_point", "self_attn.q_proj.output_scale"),
    *("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale", "self_attn.qkv_proj.k_scale"),
    *("self_attn.attn.k_scale", "self_attn.attn.impl.v_scale", "self_attn.mla_attn.k_scale"),
    *("self_attn.kv_scale", "self_attn.prob_output_scale", "self_attn.attn.prob_scale"),
    *("self_attn.k_proj.kv_cache_scale", "self_attn.v_proj.kv_cache_offset"),
]
OTHERS = [
    *("self_attn.k_proj.weight_scale", "self_attn.k_proj.scales", "self_attn.o_proj.output_scale"),
    *("self_attn.k_proj.weight_zero_point", "self_attn.k_proj.input_scale"),
    *("self_attn.k_norm.weight", "mlp.k_scale", "mlp.down_proj.output_scale", "logit_scale"),
    *("self_attn.k_proj.bias", "self_attn.logit_scale", "self_attn.scale"),
]


def split(*names: str) -> list[str]:
    infos = {name: TensorInfo(name, Path("f"), np.dtype("f4"), (1,), 0) for name in names}
    others, scales = split_cache_scales(infos)
    assert [*others] == [name for name in names if name not in scales]
    return scales


def test_names_that_tools_give_them_are_known():
    names = [f"model.layers.0.{name}" for name in SCALES]
    assert split(*names, *(f"model.layers.0.{name}" for name in OTHERS)) == names


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_all_that_compressed_tensors_gives_an_attention_module_is_known(strategy):
    torch = pytest.importorskip("torch")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    initialize = pytest.importorskip("compressed_tensors.quantization.lifecycle.initialize")
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy=strategy)
    module = torch.nn.Module()
    for name in "qkv":
        initialize.initialize_qparams(module, name, args, (2, None, 32), torch.bfloat16)
    names = [f"{ATTENTION}.{name}" for name in module.state_dict()]
    assert {f"{ATTENTION}.{name}_scale" for name in "qkv"} < set(names)
    assert split(*names) == names


def write(folder, *, packed: bool, **config) -> Path:
    tensors = {f"{ATTENTION}.q_scale": np.ones(1, np.float32), "model.norm.weight": np.ones(4)}
    for name in ("k", "v"):
        path = f"{ATTENTION}.{name}_proj"
        tensors[f"{ATTENTION}.{name}_scale"] = np.ones(1, np.float32)
        if packed:
            tensors |= prefix_names(path, make_tensors(SPEC))
            tensors[f"{path}.output_scale"] = np.ones(1, np.float32)
    return write_folder(folder, make_config(SPEC, **config) if packed else {}, [tensors])


@pytest.mark.parametrize("scheme", [{}, {"num_bits": 8, "type": "float"}])
def test_the_way_out_that_the_refusal_names_leaves_them_out_with_a_warning(tmp_path, scheme):
    with pytest.raises(CheckpointError) as caught:
        make_plan(write(tmp_path / "c", packed=True, kv_cache_scheme=scheme))
    [fault] = caught.value.faults
    assert fault.tensor == "quantization_config.kv_cache_scheme"
    assert fault.way_out.startswith("set it to null: ")
    plan = make_plan(write(tmp_path / "d", packed=True, kv_cache_scheme=None))
    assert plan.plain.keys() == {"model.norm.weight"}
    assert plan.quantized.keys() == {f"{ATTENTION}.{name}_proj" for name in ("k", "v")}
    [warning] = plan.warnings
    assert warning.startswith(f"{ATTENTION}.") and "4 more tensors not read: scales" in warning


def test_a_checkpoint_that_is_not_quantized_may_call_its_parameters_so(tmp_path):
    plan = make_plan(write(tmp_path / "c", packed=False))
    assert f"{ATTENTION}.k_scale" in plan.plain and not plan.warnings
