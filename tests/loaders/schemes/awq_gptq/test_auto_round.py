"""Configs of AutoRound's own format: read as those of the tool whose layout it takes, or refused.

What each `packing_format` means is said by auto_round 0.14 (`inference/convert_model.py` and
`inference/backend.py`) and, of the older field `backend`, by 0.4 (`export_to_autoround/export.py`).
"""

from __future__ import annotations

from typing import Any

import jax
import pytest

from loaders.errors import CheckpointError, Fault, join_alike, shorten
from loaders.plan import make_plan
from loaders.schemes.awq_gptq.config import AwqGptqConfig
from loaders.schemes.awq_gptq.schemes import TransposedScheme
from loaders.schemes.quantization_config import parse_quantization
from loaders.stream import load_params
from tests.awq_gptq import (
    describe_auto_round,
    describe_awq,
    describe_gptq,
    make_linear,
    pack_awq,
    pack_gptq,
)
from tests.checkpoints import assert_same_bits
from tests.folders import prefix_names, write_folder

LINEAR = make_linear(32, 64)
CONFIG = describe_auto_round(LINEAR, sym=True)
NAME = "model.layers.0.mlp.up_proj"
MIXED = CONFIG | {
    "extra_config": {
        "lm_head": {"bits": 8, "group_size": None, "sym": False, "act_bits": 16},
        "model.layers.0.self_attn.o_proj": {"bits": 8},
        "model.layers.0.self_attn.q_proj": {"bits": 16, "data_type": "float", "act_bits": 16},
        r".*mlp\.gate.*": {"bits": 16, "data_type": "fp", "group_size": -1},
        r"layers\.1\.": {"bits": 2, "group_size": 64, "data_type": "int"},
        r".*": {"sym": True},
    }
}


def _parse(config: dict[str, Any]) -> AwqGptqConfig:
    parsed, faults = parse_quantization({"quantization_config": config})
    assert not faults, faults
    assert isinstance(parsed, AwqGptqConfig)
    assert parsed.check_groups({"m": {"weight_packed": None}}) == ([], [])  # pyright: ignore
    return parsed


def _name_packing(value: str | None, field: str = "packing_format", **changes: Any) -> dict:
    return {k: v for k, v in CONFIG.items() if k != "packing_format"} | {field: value} | changes


GPTQ_SYM = TransposedScheme(4, 32, True, False, "gptq", "middle_less_one")
GPTQ_ASYM = TransposedScheme(4, 32, False, False, "gptq", "less_one")
PLAIN_SYM = TransposedScheme(4, 32, True, False, "gptq", "middle")
PLAIN_ASYM = TransposedScheme(4, 32, False, False, "gptq", "words")
AWQ_SYM = TransposedScheme(4, 32, True, False, "awq", "middle")
AWQ_ASYM = TransposedScheme(4, 32, False, False, "awq", "words")


@pytest.mark.parametrize(
    ("config", "symmetric", "asymmetric"),
    [
        (_name_packing("auto_round:auto_gptq"), GPTQ_SYM, GPTQ_ASYM),
        (_name_packing("auto_round:gptq"), GPTQ_SYM, GPTQ_ASYM),
        (_name_packing(None), GPTQ_SYM, GPTQ_ASYM),
        (_name_packing("auto_round:gptqmodel"), PLAIN_SYM, PLAIN_ASYM),
        (_name_packing("auto_round"), PLAIN_SYM, PLAIN_ASYM),
        (_name_packing("auto_round:auto_awq"), AWQ_SYM, AWQ_ASYM),
        (_name_packing("auto_round:awq"), AWQ_SYM, AWQ_ASYM),
        # of transformers, which adds the kernel to run with
        (_name_packing("auto_round:auto_awq", backend="gptqmodel:marlin"), AWQ_SYM, AWQ_ASYM),
        # 0.2 to 0.4
        (_name_packing("gptq:exllamav2", "backend"), GPTQ_SYM, GPTQ_ASYM),
        (_name_packing("auto_gptq:cuda", "backend"), GPTQ_SYM, GPTQ_ASYM),
        (_name_packing("auto_round:gptq:exllamav2", "backend"), GPTQ_SYM, GPTQ_ASYM),
        (_name_packing("auto_round:exllamav2", "backend"), PLAIN_SYM, PLAIN_ASYM),
        (_name_packing("auto_round:triton", "backend"), PLAIN_SYM, PLAIN_ASYM),
        (_name_packing("auto_round:auto_awq:gemm", "backend"), AWQ_SYM, AWQ_ASYM),
    ],
    ids=str,
)
def test_each_packing_format_has_the_layout_and_zero_points_of_a_tool(
    config, symmetric, asymmetric
):
    for method in ("auto-round", "intel/auto-round", "Auto_Round"):
        assert _parse(config | {"quant_method": method}).find_scheme(NAME) == symmetric
    parsed = _parse(config | {"sym": False})
    assert parsed.find_scheme(NAME) == parsed.find_scheme("lm_head") == asymmetric


@pytest.mark.parametrize(
    ("changes", "field", "what"),
    [
        ({"packing_format": "auto_round:llm_compressor"}, "packing_format", "llm_compressor"),
        ({"packing_format": "auto_round:fp8_static"}, "packing_format", "expected 'auto_round', "),
        ({"packing_format": "mlx"}, "packing_format", "found 'mlx'"),
        ({"packing_format": "auto_gptq:marlin"}, "packing_format", "found 'auto_gptq:marlin'"),
        ({"packing_format": 4}, "packing_format", "found 4"),
        ({"data_type": "mx_fp"}, "data_type", "integers"),
        ({"act_bits": 8}, "act_bits", "quantized activations"),
        ({"rotation_config": {"block_size": 32}}, "rotation_config", "rotations"),
        ({"static_kv_dtype": "fp8"}, "static_kv_dtype", "key-value cache"),
        ({"extra_config": [1]}, "extra_config", "expected an object"),
        ({"extra_config": {NAME: 8}}, "extra_config", "expected an object, found 8"),
        ({"extra_config": {".*(": {"bits": 8}}}, "extra_config", "is not a regular expression"),
        ({"extra_config": {NAME: {"bits": 7}}}, "extra_config.bits", "found 7"),
        ({"extra_config": {NAME: {"act_bits": 8}}}, "extra_config", "found act_bits = 8"),
        ({"extra_config": {NAME: {"data_type": "fp", "bits": 8}}}, "extra_config", "'fp'"),
        ({"extra_config": {NAME: {"sparkle": 8}}}, "extra_config", "sparkle is not known"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_field(changes, field, what):
    _, faults = parse_quantization({"quantization_config": CONFIG | changes})
    [fault] = faults
    assert (fault.file, fault.tensor) == ("config.json", f"quantization_config.{field}")
    assert what in fault.what
    assert fault.way_out


@pytest.mark.parametrize("config", [MIXED, describe_gptq(LINEAR, **{**MIXED, "lm_head": True})])
def test_a_module_has_its_own_scheme_before_that_of_the_first_pattern_in_its_path(config):
    parsed = _parse(config)
    eight = TransposedScheme(8, 32, True, False, "gptq", "middle_less_one")
    assert parsed.find_scheme("model.layers.0.self_attn.o_proj") == eight
    assert parsed.find_scheme("model.layers.0.self_attn.q_proj") is None
    assert parsed.find_scheme("model.layers.1.mlp.gate") is None
    two = TransposedScheme(2, 64, True, False, "gptq", "middle_less_one")
    assert parsed.find_scheme("model.layers.1.mlp.up_proj") == two
    # a pattern anywhere in the path, a path as a whole alone
    assert parsed.find_scheme("model.layers.11.self_attn.o_proj") == GPTQ_SYM
    head = TransposedScheme(8, 32, False, False, "gptq", "less_one")
    assert parsed.find_scheme("lm_head") == head


def test_under_awq_only_four_bits_and_plain_modules_are_read():
    config = describe_awq(LINEAR, extra_config={NAME: {"bits": 16}, "n": {"group_size": 64}})
    parsed = _parse(config)
    assert parsed.find_scheme(NAME) is None
    assert parsed.find_scheme("n") == TransposedScheme(4, 64, False, False, "awq", "words")
    config["extra_config"] = {NAME: {"bits": 8}}
    [fault] = parse_quantization({"quantization_config": config})[1]
    assert "expected 4 of awq, found 8" in fault.what


def test_names_and_patterns_that_match_nothing_are_told():
    parsed = _parse(MIXED)
    assert parsed.describe_unused(["lm_head", "model.layers.0.mlp.gate_proj"]) == [
        r"config.json: pattern 'layers\\.1\\.' of extra_config matches no module",
        "config.json: 2 entries of extra_config match no module: "
        "'model.layers.0.self_attn.o_proj', 'model.layers.0.self_attn.q_proj'",
    ]


@pytest.mark.parametrize(
    ("packing", "pack"),
    [
        ("auto_round:auto_gptq", pack_gptq),
        ("auto_round", lambda linear: pack_gptq(linear, format="gptq_v2")),
        ("auto_round:auto_awq", pack_awq),
    ],
)
def test_asymmetric_leaves_are_those_of_the_other_tools_form(tmp_path, packing, pack):
    tensors = prefix_names("m", pack(LINEAR))
    tensors.pop("m.g_idx", None)
    config = {"quantization_config": describe_auto_round(LINEAR, packing_format=packing)}
    found = make_plan(write_folder(tmp_path / "a", config, [tensors]))
    v1 = {"quantization_config": describe_gptq(LINEAR)}
    expected = make_plan(write_folder(tmp_path / "b", v1, [prefix_names("m", pack_gptq(LINEAR))]))
    assert found.specs == expected.specs
    jax.tree.map(assert_same_bits, load_params(found), load_params(expected))


def test_what_is_wrong_with_every_module_is_said_once(tmp_path):
    tensors = pack_gptq(make_linear(32, 64, symmetric=True))
    names = [f"model.layers.{i}.mlp.{n}_proj" for i in range(3) for n in ("up", "down")]
    held = {key: a for name in names for key, a in prefix_names(name, tensors).items()}
    for i, (config, what) in enumerate(
        [
            (CONFIG | {"packing_format": "mlx"}, "found 'mlx'"),
            (CONFIG | {"extra_config": {".*": {"bits": 16}}}, "says that it is not converted"),
            (CONFIG | {"group_size": 16}, r"expected float16 or bfloat16 or float32 [4, 32]"),
        ]
    ):
        folder = write_folder(tmp_path / str(i), {"quantization_config": config}, [held])
        with pytest.raises(CheckpointError) as caught:
            make_plan(folder)
        faults = [fault for fault in caught.value.faults if what in fault.what]
        assert len(faults) == 1
        assert len(caught.value.faults) <= 2  # of another group size, zero points are as well


def test_names_that_differ_in_numbers_are_written_as_one():
    experts = [f"layers.{i}.experts.{j}.up" for i in range(3) for j in (0, 1, 7)]
    assert shorten(experts) == ["layers.0-2.experts.0-1,7.up"]
    assert shorten(experts[:-1]) == ["layers.*.experts.*.up"]
    assert shorten(["lm_head", "a.0", "a.2", "b.{}.01"]) == ["lm_head", "a.0,2", "b.{}.01"]
    faults = [Fault("is missing", f"f{i}", name) for i, name in enumerate(experts)]
    assert join_alike(faults[:3]) == faults[:3]
    [joined] = join_alike(faults)
    assert (joined.file, joined.tensor) == ("f0", experts[0])
    assert joined.what == "is missing; the same of 9 in all: layers.0-2.experts.0-1,7.up"
