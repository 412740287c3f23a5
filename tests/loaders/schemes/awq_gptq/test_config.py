"""Configs of AutoAWQ, AutoGPTQ, GPTQModel, optimum and AutoRound: read, or refused by field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from loaders.errors import CheckpointError
from loaders.plan import make_plan
from loaders.schemes.awq_gptq.config import AwqGptqConfig
from loaders.schemes.awq_gptq.schemes import TransposedScheme
from loaders.schemes.quantization_config import parse_quantization
from tests.awq_gptq import describe_awq, describe_gptq, make_linear, pack_awq, pack_gptq
from tests.folders import prefix_names, write_folder

LINEAR = make_linear(32, 64)
AWQ, GPTQ = describe_awq(LINEAR), describe_gptq(LINEAR)
V1 = TransposedScheme(4, 32, False, False, "gptq", "less_one")
GEMM = TransposedScheme(4, 32, False, False, "awq", "words")

PUBLISHED = {
    "AutoAWQ": (
        {
            "bits": 4,
            "group_size": 128,
            "modules_to_not_convert": None,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        },
        TransposedScheme(4, 128, False, False, "awq", "words"),
    ),
    "quant_config.json of AutoAWQ": (
        {
            "zero_point": True,
            "q_group_size": 64,
            "w_bit": 4,
            "version": "GEMM",
            "quant_method": "awq",
        },
        TransposedScheme(4, 64, False, False, "awq", "words"),
    ),
    "transformers 4, AWQ": (
        {
            "backend": "autoawq",
            "bits": 4,
            "do_fuse": False,
            "exllama_config": None,
            "fuse_max_seq_len": None,
            "group_size": -1,
            "modules_to_fuse": None,
            "modules_to_not_convert": ["lm_head"],
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        },
        TransposedScheme(4, -1, False, False, "awq", "words"),
    ),
    "GPTQModel, AWQ": (
        {
            "bits": 4,
            "checkpoint_format": "gemm",
            "desc_act": False,
            "format": "gemm",
            "group_size": 128,
            "lm_head": False,
            "meta": {"quantizer": ["gptqmodel:5.6.0"]},
            "method": "awq",
            "pack_dtype": "int32",
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": False,
        },
        TransposedScheme(4, 128, True, False, "awq", "middle"),
    ),
    "AutoGPTQ": (
        {
            "bits": 4,
            "group_size": 128,
            "damp_percent": 0.1,
            "desc_act": True,
            "static_groups": False,
            "sym": True,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "quant_method": "gptq",
        },
        TransposedScheme(4, 128, True, True, "gptq", "middle_less_one"),
    ),
    "transformers 4, GPTQ": (
        {
            "batch_size": 1,
            "bits": 8,
            "block_name_to_quantize": None,
            "cache_block_outputs": True,
            "damp_percent": 0.01,
            "dataset": None,
            "desc_act": False,
            "exllama_config": {"version": 1},
            "group_size": 128,
            "max_input_length": None,
            "model_seqlen": None,
            "module_name_preceding_first_block": None,
            "modules_in_block_to_quantize": None,
            "pad_token_id": None,
            "quant_method": "gptq",
            "sym": True,
            "tokenizer": None,
            "true_sequential": True,
            "use_cuda_fp16": False,
            "use_exllama": True,
        },
        TransposedScheme(8, 128, True, False, "gptq", "middle_less_one"),
    ),
    "GPTQModel": (
        {
            "bits": 4,
            "checkpoint_format": "gptq",
            "desc_act": False,
            "format": "gptq",
            "group_size": 32,
            "lm_head": False,
            "meta": {
                "act_group_aware": True,
                "damp_percent": 0.05,
                "quantizer": ["gptqmodel:4.2.5"],
                "static_groups": False,
                "uri": "https://github.com/modelcloud/gptqmodel",
            },
            "pack_dtype": "int32",
            "quant_method": "gptq",
            "sym": False,
        },
        TransposedScheme(4, 32, False, False, "gptq", "less_one_borrowed"),
    ),
    "optimum": (
        {
            "bits": 2,
            "dataset": None,
            "group_size": 64,
            "damp_percent": 0.1,
            "desc_act": False,
            "act_group_aware": True,
            "sym": False,
            "true_sequential": True,
            "quant_method": "gptq",
            "modules_in_block_to_quantize": None,
            "format": "gptq_v2",
            "meta": {"quantizer": ["optimum:2.3.0", "gptqmodel:7.7.0"]},
        },
        TransposedScheme(2, 64, False, False, "gptq", "words"),
    ),
    "AutoRound": (
        {
            "act_bits": 16,
            "autoround_version": "0.5.1",
            "bits": 4,
            "damp_percent": 0.01,
            "data_type": "int",
            "desc_act": False,
            "enable_quanted_input": False,
            "group_size": 128,
            "iters": 0,
            "lm_head": False,
            "low_gpu_mem_usage": True,
            "nsamples": 512,
            "provider": "auto-round",
            "quant_method": "gptq",
            "sym": True,
            "true_sequential": False,
        },
        TransposedScheme(4, 128, True, False, "gptq", "middle_less_one"),
    ),
}


def _parse(config: dict[str, Any]) -> AwqGptqConfig:
    parsed, faults = parse_quantization({"quantization_config": config})
    assert not faults, faults
    assert isinstance(parsed, AwqGptqConfig)
    return parsed


@pytest.mark.parametrize("tool", PUBLISHED)
def test_what_tools_write_is_read_without_a_remark(tool):
    config, expected = PUBLISHED[tool]
    parsed = _parse(config)
    assert parsed.find_scheme("model.layers.0.mlp.up_proj") == expected
    assert parsed.check_groups({"m": {"weight_packed": None}}) == ([], [])  # pyright: ignore


@pytest.mark.parametrize(
    ("config", "field", "what"),
    [
        (AWQ | {"version": "gemv"}, "version", "expected 'gemm', found 'gemv'"),
        (AWQ | {"version": "marlin"}, "version", "expected 'gemm', found 'marlin'"),
        (AWQ | {"version": "gemv_fast"}, "version", "found 'gemv_fast'"),
        (AWQ | {"backend": "llm-awq"}, "backend", "found that of llm-awq"),
        (AWQ | {"bits": 8}, "bits", "expected 4 of awq, found 8"),
        (AWQ | {"bits": None}, "bits", "found None"),
        (AWQ | {"zero_point": 1}, "zero_point", "expected true or false, found 1"),
        (AWQ | {"modules_to_not_convert": "gate"}, "modules_to_not_convert", "expected names"),
        (AWQ | {"modules_to_not_convert": ["("]}, "modules_to_not_convert", "is not a regular"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format", "found 'marlin'"),
        (GPTQ | {"checkpoint_format": "gptq_p"}, "checkpoint_format", "found 'gptq_p'"),
        (GPTQ | {"format": "bitblas"}, "format", "found 'bitblas'"),
        (
            GPTQ | {"format": "gptq", "checkpoint_format": "gptq_v2"},
            "checkpoint_format",
            "'gptq_v2' contradicts format = 'gptq'",
        ),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format", "Marlin's kernel"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype", "words of 32 bits"),
        (GPTQ | {"bits": 5}, "bits", "expected 2 or 3 or 4 or 8 of gptq, found 5"),
        (GPTQ | {"bits": True}, "bits", "found True"),
        (GPTQ | {"group_size": 0}, "group_size", "expected a size above 0 or -1, found 0"),
        (GPTQ | {"group_size": None}, "group_size", "found None"),
        (GPTQ | {"sym": "yes"}, "sym", "expected true or false"),
        (GPTQ | {"desc_act": 0}, "desc_act", "expected true or false"),
        (GPTQ | {"lm_head": "yes"}, "lm_head", "expected true or false"),
        (GPTQ | {"act_bits": 8}, "act_bits", "quantized activations"),
        (GPTQ | {"activation": {"mode": "w4afp8"}}, "activation", "quantized activations"),
        (GPTQ | {"rotation": "hadamard"}, "rotation", "rotations between layers"),
        (GPTQ | {"adapter": {"rank": 8}}, "adapter", "an adapter"),
        (GPTQ | {"data_type": "nv_fp"}, "data_type", "only weights that are integers"),
        (GPTQ | {"dynamic": ["+:.*"]}, "dynamic", "expected an object"),
        (GPTQ | {"dynamic": {"+:[": {}}}, "dynamic", "is not a regular expression"),
        (GPTQ | {"dynamic": {"+:(.*)*.*\\1": {}}}, "dynamic", "could take forever"),
        (GPTQ | {"dynamic": {"+:.*": 8}}, "dynamic", "expected an object, found 8"),
        (GPTQ | {"dynamic": {"+:.*": {"rank": 8}}}, "dynamic", "rank is not known"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 7}}}, "dynamic.bits", "found 7"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_field(config, field, what):
    _, faults = parse_quantization({"quantization_config": config})
    [fault] = faults
    assert (fault.file, fault.tensor) == ("config.json", f"quantization_config.{field}")
    assert what in fault.what
    assert fault.way_out


def test_all_fields_that_are_wrong_are_listed():
    config = GPTQ | {"bits": 5, "checkpoint_format": "marlin", "rotation": "hadamard"}
    _, faults = parse_quantization({"quantization_config": config})
    names = {fault.tensor.rpartition(".")[2] for fault in faults}
    assert names == {"bits", "checkpoint_format", "rotation"}


def test_a_field_that_nobody_knows_is_told():
    [remark] = _parse(GPTQ | {"sparkle": 1}).check_groups({})[1][:1]
    assert remark.endswith("unknown, and not used: sparkle")


def test_the_first_rule_that_matches_counts():
    parsed = _parse(
        GPTQ
        | {
            "dynamic": {
                "-:.*\\.mlp\\.gate$": {},
                "+:.*layers\\.0\\..*": {"bits": 8, "group_size": 64, "mse": 2.0},
                ".*layers\\.[01]\\..*": {"sym": True, "desc_act": True, "bits": 2},
            }
        }
    )
    assert parsed.find_scheme("model.layers.0.mlp.gate") is None
    eight = TransposedScheme(8, 64, False, False, "gptq", "less_one")
    assert parsed.find_scheme("model.layers.0.mlp.gate_proj") == eight
    two = TransposedScheme(2, 32, True, True, "gptq", "middle_less_one")
    assert parsed.find_scheme("model.layers.1.mlp.up_proj") == two
    assert parsed.find_scheme("model.layers.2.mlp.up_proj") == V1
    assert parsed.describe_unused([f"model.layers.{i}.mlp.gate" for i in (0, 1)]) == []
    assert parsed.describe_unused(["model.layers.1.mlp.up_proj"]) == [
        r"config.json: pattern '.*\\.mlp\\.gate$' of dynamic matches no module",
        r"config.json: pattern '.*layers\\.0\\..*' of dynamic matches no module",
    ]


def test_a_rule_replaces_the_other_spelling_of_a_field():
    config = AWQ | {"dynamic": {".*down_proj": {"group_size": 64, "sym": True}}}
    config["q_group_size"] = config.pop("group_size")
    scheme = _parse(config).find_scheme("model.layers.0.mlp.down_proj")
    assert scheme == TransposedScheme(4, 64, True, False, "awq", "middle")


NAMES = (
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.gate_proj",
    "model.layers.11.mlp.gate",
    "model.layers.1.block_sparse_moe.gate",
    "model.visual.blocks.0.attn.qkv",
    "visual.blocks.0.attn.qkv",
    "model.layers.1.self_attn.q_proj",
)


@pytest.mark.parametrize(
    "kept",
    [
        ["gate"],
        ["mlp.gate"],
        ["visual"],
        ["model.layers.1"],
        ["model.layers.1."],
        ["model.layers.*.mlp"],
        ["q_proj|visual", "model.layers.11.mlp.gate"],
        ["(model)\\.layers\\.(1)", "k_proj"],
    ],
)
def test_modules_are_kept_as_transformers_keeps_them(kept):
    parsed = _parse(AWQ | {"modules_to_not_convert": kept})
    found = [name for name in NAMES if parsed.find_scheme(name) == GEMM]
    assert found == [name for name in NAMES if should_convert_module(name, kept)]


def test_names_that_match_nothing_are_told_once():
    kept = ["lm_head", "visual", "gate", "nowhere", "neither"]
    parsed = _parse(AWQ | {"modules_to_not_convert": kept})
    modules = ["lm_head", "model.visual.merger", "model.layers.0.mlp.gate"]
    assert parsed.describe_unused(modules) == [
        "config.json: 2 entries of modules_to_not_convert match no module: 'nowhere', 'neither'"
    ]


def _list_faults(folder, config, tensors):
    with pytest.raises(CheckpointError) as caught:
        make_plan(write_folder(folder, {"quantization_config": config}, [tensors]))
    return caught.value.faults


def test_a_packed_module_that_the_config_keeps_is_refused(tmp_path):
    head = prefix_names("lm_head", pack_gptq(LINEAR))
    [fault] = _list_faults(tmp_path / "a", GPTQ, head)
    assert fault.tensor == "lm_head"
    assert "says that it is not converted" in fault.what
    plan = make_plan(
        write_folder(tmp_path / "b", {"quantization_config": GPTQ | {"lm_head": True}}, [head])
    )
    assert list(plan.specs) == ["lm_head"]
    gate = prefix_names("mlp.gate", pack_awq(LINEAR))
    kept = AWQ | {"modules_to_not_convert": ["gate"]}
    [fault] = _list_faults(tmp_path / "c", kept, gate)
    assert fault.tensor == "mlp.gate"
    negative = AWQ | {"dynamic": {"-:.*gate": {}}}
    [fault] = _list_faults(tmp_path / "d", negative, gate)
    assert fault.tensor == "mlp.gate"


def test_a_config_without_a_packed_module_is_told(tmp_path):
    tensors = {"m.weight": np.ones((4, 4), np.float32)}
    plan = make_plan(write_folder(tmp_path / "a", {"quantization_config": GPTQ}, [tensors]))
    assert plan.warnings == ("config.json: quant_method is gptq, but no module is packed",)
