"""Whole checkpoints whose config has groups of other formats, or targets of every kind."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from loaders.errors import CheckpointError
from loaders.plan import make_plan
from pallas_kernels.format.spec import QuantSpec
from tests.awq_gptq import make_linear, pack_gptq
from tests.fault_kinds import find_kind
from tests.folders import describe_weights, make_config, make_tensors, prefix_names, write_folder

SPEC = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=64, out_features=8)
EIGHT = QuantSpec(bits=8, group_size=32, symmetric=True, in_features=64, out_features=8)
FP8 = {
    "targets": ["Linear"],
    "format": "float-quantized",
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
}
PATHS = [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")]


def _write(folder, config, *, packed=PATHS, plain=(), floats=()):
    tensors: dict[str, np.ndarray] = {"model.norm.weight": np.ones(64, np.float32)}
    for path in packed:
        tensors |= prefix_names(path, make_tensors(SPEC))
    for path in plain:
        tensors[f"{path}.weight"] = np.ones((8, 64), np.float32)
    for path in floats:
        tensors[f"{path}.weight"] = np.ones((8, 64), ml_dtypes.float8_e4m3fn)
        tensors[f"{path}.weight_scale"] = np.ones((8, 1), np.float32)
    return write_folder(folder, config, [tensors])


def test_modules_of_a_refused_group_are_named_and_nothing_else(tmp_path):
    config = make_config(SPEC, targets=[["re:.*mlp.*"]])
    config["quantization_config"]["config_groups"]["fp8"] = FP8
    heads = [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"]
    folder = _write(tmp_path / "c", config, floats=heads, plain=["model.layers.0.mlp.gate"])
    with pytest.raises(CheckpointError) as caught:
        make_plan(folder)
    fields = [fault.tensor for fault in caught.value.faults]
    group = "quantization_config.config_groups.fp8"
    assert fields == [f"{group}.input_activations", f"{group}.format", f"{group}.weights.type"]
    for fault in caught.value.faults:
        assert "8 modules, model.layers.*.self_attn.k_proj, " in fault.what
        assert fault.what.endswith("…") and "jaxwna16 quantize" in fault.way_out


def test_packed_weights_with_quantized_activations_are_refused_once(tmp_path):
    config = make_config(SPEC)
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(CheckpointError) as caught:
        make_plan(_write(tmp_path / "c", config))
    [fault] = caught.value.faults
    assert "6 modules, model.layers.*.mlp.down_proj, " in fault.what


def test_a_refused_group_beside_a_refused_cache_is_listed_too(tmp_path):
    config = make_config(SPEC, kv_cache_scheme={"num_bits": 8}, format="marlin-24")
    with pytest.raises(CheckpointError) as caught:
        make_plan(_write(tmp_path / "c", config))
    fields = [fault.tensor for fault in caught.value.faults]
    assert fields == ["quantization_config.kv_cache_scheme", "quantization_config.format"]


def test_a_refused_group_without_modules_is_a_warning_of_the_plan(tmp_path):
    config = make_config(SPEC)
    config["quantization_config"]["config_groups"]["fp8"] = FP8 | {"targets": ["re:mtp.*"]}
    plan = make_plan(_write(tmp_path / "c", config, plain=["mtp.fc"]))
    assert plan.quantized.keys() == set(PATHS)
    assert len([w for w in plan.warnings if "no module here is quantized so" in w]) == 3


def test_head_and_embedding_are_quantized_by_their_class(tmp_path):
    config = make_config(SPEC, EIGHT, targets=[["Linear"], ["Embedding"]])
    tensors = prefix_names("lm_head", make_tensors(SPEC))
    tensors |= prefix_names("model.embed_tokens", make_tensors(EIGHT))
    plan = make_plan(write_folder(tmp_path / "c", config, [tensors]))
    assert {path: module.spec for path, module in plan.quantized.items()} == {
        "lm_head": SPEC,
        "model.embed_tokens": EIGHT,
    }
    assert not plan.warnings


def test_a_packed_embedding_that_only_linears_are_targeted_for_is_a_fault(tmp_path):
    folder = _write(tmp_path / "c", make_config(SPEC), packed=["model.embed_tokens"])
    with pytest.raises(CheckpointError, match="no target of config_groups matches it"):
        make_plan(folder)


def test_a_config_in_text_config_is_planned(tmp_path):
    plan = make_plan(_write(tmp_path / "c", {"text_config": make_config(SPEC)}))
    assert plan.quantized.keys() == set(PATHS)


def test_actorder_group_without_its_tensor_is_a_fault(tmp_path):
    weights = describe_weights(SPEC) | {"actorder": "group"}
    config = make_config(SPEC, version="0.17.0")
    config["quantization_config"]["config_groups"]["group_0"]["weights"] = weights
    with pytest.raises(CheckpointError) as caught:
        make_plan(_write(tmp_path / "c", config, packed=PATHS[:1]))
    [fault] = caught.value.faults
    assert fault.tensor == f"{PATHS[0]}.weight_g_idx" and "missing" in fault.what


@pytest.mark.parametrize("stated", ["is not there", "is null", "is {}"])
@pytest.mark.parametrize("tool", ["compressed-tensors", "AutoAWQ or GPTQ"])
def test_packed_modules_without_a_config_are_one_fault(tmp_path, tool, stated):
    config = {} if stated == "is not there" else {"quantization_config": None}
    config |= {"quantization_config": {}} if stated == "is {}" else {}
    if tool == "compressed-tensors":
        folder = _write(tmp_path / "c", config)
    else:
        linear = pack_gptq(make_linear(8, 64))
        tensors = {n: a for path in PATHS for n, a in prefix_names(path, linear).items()}
        folder = write_folder(tmp_path / "c", config, [tensors])
    with pytest.raises(CheckpointError) as caught:
        make_plan(folder)
    [fault] = caught.value.faults
    assert (fault.file, fault.tensor) == ("config.json", "quantization_config")
    start = f"{stated}, but modules are packed as by {tool}: 6 modules, model.layers.*.mlp."
    assert fault.what.startswith(start)
    assert "into config.json" in fault.way_out
    assert find_kind(fault) == 13
