"""`quantize_checkpoint` and `dequantize_checkpoint` on Mixture-of-Experts checkpoints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.utils.match import match_name

import jaxwna16
from jaxwna16 import CheckpointError, InputError, QuantSpec
from jaxwna16.cli import verify
from loaders.plan import make_plan
from tests.awq_gptq import describe_gptq, make_linear, pack_gptq
from tests.checkpoints import (
    assert_same_bits,
    compress,
    decompress,
    make_args,
    make_weight,
    read_files,
    to_numpy,
    write_folder,
)
from tests.folders import make_config
from tests.folders import prefix_names as prefix
from tests.folders import write_folder as write_arrays
from tests.grids import cover

EXPERTS, INNER, HIDDEN = 3, 40, 64
BLOCK = "model.layers.0.mlp"
PATH = f"{BLOCK}.experts"
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
ROUTERS = {
    f"{BLOCK}.gate": (EXPERTS, HIDDEN),
    f"{BLOCK}.shared_expert_gate": (1, HIDDEN),
    "model.layers.1.mlp.router": (EXPERTS, HIDDEN),
}


def _make_separate(biases=False) -> dict[str, np.ndarray]:
    """Experts one by one."""
    tensors = {}
    for expert in range(EXPERTS):
        for i, (name, shape) in enumerate(SHAPES.items()):
            weight = make_weight(shape, 10 * expert + i).numpy()
            tensors[f"{PATH}.{expert}.{name}.weight"] = weight
            if biases:
                tensors[f"{PATH}.{expert}.{name}.bias"] = weight[:, 0].copy()
    return tensors


def _stack(separate: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same experts in two tensors, as transformers names them; or four with biases."""
    stacked = {}
    for role in {name.rpartition(".")[2] for name in separate}:
        suffix = "_bias" if role == "bias" else ""
        gate, up, down = (
            np.stack([separate[f"{PATH}.{e}.{name}.{role}"] for e in range(EXPERTS)])
            for name in SHAPES
        )
        stacked[f"{PATH}.gate_up_proj{suffix}"] = np.concatenate([gate, up], axis=1)
        stacked[f"{PATH}.down_proj{suffix}"] = down
    return stacked


def _write(folder: Path, experts: dict[str, np.ndarray]) -> Path:
    others = {
        f"{path}.weight": make_weight(shape, 90 + i).numpy()
        for i, (path, shape) in enumerate(ROUTERS.items())
    }
    others["model.layers.0.self_attn.q_proj.weight"] = make_weight((HIDDEN, HIDDEN), 99).numpy()
    others[f"{BLOCK}.gate.e_score_correction_bias"] = np.zeros(EXPERTS, np.float32)
    others["lm_head.weight"] = make_weight((50, HIDDEN), 98).numpy()
    config = {"model_type": "qwen3_moe", "num_experts": EXPERTS}
    return write_arrays(folder, config, [others | experts])


def _assert_same_files(first: Path, second: Path) -> None:
    found, expected = read_files(first), read_files(second)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor)


def test_routers_and_the_head_stay_floats_and_stand_in_ignore(tmp_path):
    source = _write(tmp_path / "source", _make_separate())
    jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=8)
    checkpoint = jaxwna16.load_checkpoint(tmp_path / "out")
    assert not checkpoint.warnings
    ignore = checkpoint.config["quantization_config"]["ignore"]
    assert all(any(match_name(path, entry) for entry in ignore) for path in [*ROUTERS, "lm_head"])
    assert checkpoint.specs.keys() == {
        "model.layers.0.self_attn.q_proj",
        f"{PATH}.w13",
        f"{PATH}.w2",
    }
    before, after = read_files(source), read_files(tmp_path / "out")
    for path in ROUTERS:
        assert_same_bits(after[f"{path}.weight"], before[f"{path}.weight"])


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "biases"), cover([(4, 8, False), (8, -1, True)], [False, True])
)
def test_separate_and_stacked_experts_are_quantized_to_the_same_files(
    tmp_path, bits, group, symmetric, biases
):
    separate = _make_separate(biases)
    options = {"bits": bits, "group_size": group, "symmetric": symmetric}
    sources = {"a": separate, "b": _stack(separate)}
    for name, experts in sources.items():
        source = _write(tmp_path / f"source {name}", experts)
        jaxwna16.quantize_checkpoint(source, tmp_path / name, **options)
    _assert_same_files(tmp_path / "b", tmp_path / "a")
    written = read_files(tmp_path / "b")
    for expert in range(EXPERTS):
        for i, (name, (n, k)) in enumerate(SHAPES.items()):
            spec = QuantSpec(**options, in_features=k, out_features=n)
            args = make_args(spec, "float32")
            weight = make_weight((n, k), 10 * expert + i)
            path = f"{PATH}.{expert}.{name}"
            for role, tensor in compress(weight, args).items():
                assert_same_bits(written[f"{path}.{role}"], tensor)
            assert (f"{path}.bias" in written) == biases


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_dequantized_experts_are_those_of_compressed_tensors(tmp_path, symmetric, shards):
    modules = {}
    for expert in range(EXPERTS):
        for i, (name, (n, k)) in enumerate(SHAPES.items()):
            spec = QuantSpec(
                bits=4, group_size=8, symmetric=symmetric, in_features=k, out_features=n
            )
            args = make_args(spec, "bfloat16")
            tensors = compress(make_weight((n, k), 10 * expert + i), args)
            modules[f"{PATH}.{expert}.{name}"] = tensors, args
    source = write_folder(tmp_path / "source", modules, shards=shards)
    jaxwna16.dequantize_checkpoint(source, tmp_path / "out")
    dense = read_files(tmp_path / "out")
    assert dense.keys() == {f"{path}.weight" for path in modules}
    for path, (tensors, args) in modules.items():
        assert_same_bits(dense[f"{path}.weight"], decompress(tensors, args))


@pytest.mark.parametrize("symmetric", [True, False])
def test_stacked_experts_are_dequantized_to_stacked_ones(tmp_path, symmetric):
    specs = [
        QuantSpec(bits=4, group_size=8, symmetric=symmetric, in_features=k, out_features=n)
        for n, k in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    ]
    compressed, dense = {}, {}
    for name, spec in zip(("gate_up_proj", "down_proj"), specs, strict=True):
        args = make_args(spec, "bfloat16")
        tensors = compress(make_weight((EXPERTS, spec.out_features, spec.in_features)), args)
        dense[f"{PATH}.{name}"] = decompress(tensors, args)
        compressed |= {f"{PATH}.{name}.{role}": to_numpy(t) for role, t in tensors.items()}
    bias = np.arange(EXPERTS * HIDDEN, dtype=np.float32).reshape(EXPERTS, HIDDEN)
    compressed[f"{PATH}.down_proj.bias"] = bias
    dense[f"{PATH}.down_proj_bias"] = bias
    config = make_config(specs[0]) | {"num_experts": EXPERTS}
    source = write_arrays(tmp_path / "source", config, [compressed])
    jaxwna16.dequantize_checkpoint(source, tmp_path / "out")
    written = read_files(tmp_path / "out")
    assert written.keys() == dense.keys()
    for name, tensor in dense.items():
        assert_same_bits(written[name], tensor)
    assert make_plan(tmp_path / "out").stacks.keys() == {f"{PATH}.w13", f"{PATH}.w2"}


def test_where_load_checkpoint_refuses_act_order_dequantize_is_the_way_out(tmp_path):
    """As in published Mixtrals of GPTQ; the floats are those of AutoGPTQ's formula."""
    linears = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{name}": make_linear(
            *shape, group_size=16, symmetric=True, act_order=True, seed=10 * expert + i
        )
        for expert in range(2)
        for i, (name, shape) in enumerate({"w1": (32, 64), "w3": (32, 64), "w2": (64, 32)}.items())
    }
    tensors = {n: a for path, x in linears.items() for n, a in prefix(path, pack_gptq(x)).items()}
    config = {"quantization_config": describe_gptq(next(iter(linears.values())))}
    source = write_arrays(tmp_path / "source", config, [tensors])
    with pytest.raises(CheckpointError) as caught:
        jaxwna16.load_checkpoint(source)
    [fault] = caught.value.faults
    assert "`jaxwna16 dequantize`" in fault.way_out
    jaxwna16.dequantize_checkpoint(source, tmp_path / "out")
    written = read_files(tmp_path / "out")
    assert written.keys() == {f"{path}.weight" for path in linears}
    for path, linear in linears.items():
        assert_same_bits(written[f"{path}.weight"], linear.floats)
    experts = jaxwna16.load_checkpoint(tmp_path / "out").find("model.layers.0.block_sparse_moe")
    assert experts["experts"]["w13"]["weight"].shape == (2, 64, 64)


def test_experts_plain_between_packed_ones_are_dequantized_and_converted(tmp_path):
    """GPTQModel leaves an expert alone that no token of its calibration came to."""
    linears = {
        f"{PATH}.{expert}.{name}": make_linear(*shape, symmetric=True, seed=10 * expert + i)
        for expert in range(2)
        for i, (name, shape) in enumerate(
            {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}.items()
        )
    }
    floats = {f"{path}.weight": linear.floats.numpy() for path, linear in linears.items()}
    plain = f"{PATH}.1.gate_proj"
    tensors = {f"{plain}.weight": floats[f"{plain}.weight"]}
    for path, linear in linears.items():
        tensors |= {} if path == plain else prefix(path, pack_gptq(linear))
    config = {"quantization_config": describe_gptq(linears[plain])}
    source = write_arrays(tmp_path / "source", config, [tensors])
    found = jaxwna16.load_checkpoint(source)
    assert any("3 of 4 matrices are packed" in warning for warning in found.warnings)
    rows = [[floats[f"{PATH}.{e}.{n}.weight"] for n in ("gate_proj", "up_proj")] for e in (0, 1)]
    expected = np.stack([np.concatenate(pair) for pair in rows])
    assert_same_bits(found.find(f"{PATH}.w13.weight"), expected)
    assert found.specs.keys() == {f"{PATH}.w2"}
    jaxwna16.convert_checkpoint(source, tmp_path / "copy")
    assert_same_bits(
        jaxwna16.load_checkpoint(tmp_path / "copy").find(f"{PATH}.w13.weight"), expected
    )
    jaxwna16.dequantize_checkpoint(source, tmp_path / "out")
    written = read_files(tmp_path / "out")
    assert written.keys() == floats.keys()
    for name, array in floats.items():
        assert_same_bits(written[name], array)
    report = verify.run(argparse.Namespace(checkpoint=source, oracle=True, follow_links=False))
    assert "error" not in report and report["oracle"]["equal"] == 5


@pytest.mark.parametrize("ignore", [r"re:.*experts", f"{PATH}.down_proj", r"re:.*\.down_proj$"])
def test_stacked_experts_that_are_ignored_stay_stacked(tmp_path, ignore):
    stacked = _stack(_make_separate(biases=True))
    source = _write(tmp_path / "source", stacked)
    jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=8, ignore=[ignore])
    written = read_files(tmp_path / "out")
    for name in (f"{PATH}.down_proj", f"{PATH}.down_proj_bias"):
        assert_same_bits(written[name], stacked[name])
    assert (f"{PATH}.gate_up_proj" in written) == (ignore == r"re:.*experts")
    checkpoint = jaxwna16.load_checkpoint(tmp_path / "out")
    ignored = checkpoint.config["quantization_config"]["ignore"]
    assert any(match_name(f"{PATH}.down_proj", entry) for entry in ignored)
    assert not checkpoint.warnings
    assert f"{PATH}.w2" not in checkpoint.specs


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("ignore", "reason"),
    [
        (r"re:.*experts\.1\.", f"{PATH}.w13: 4 of its 6 matrices\n  - {PATH}.w2: 2 of its 3"),
        (r"re:.*\.gate_proj$", f"{PATH}.w13: 3 of its 6 matrices"),
        (f"{PATH}.2.down_proj", f"{PATH}.w2: 2 of its 3 matrices"),
    ],
)
def test_experts_are_quantized_all_or_none(tmp_path, ignore, reason, stacked):
    experts = _make_separate()
    source = _write(tmp_path / "source", _stack(experts) if stacked else experts)
    with pytest.raises(InputError, match="must all be quantized, or none") as caught:
        jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=8, ignore=[ignore])
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_every_expert_that_the_group_does_not_divide_is_listed(tmp_path):
    source = _write(tmp_path / "source", _stack(_make_separate()))
    with pytest.raises(jaxwna16.CheckpointError) as caught:
        jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=32)
    names = [fault.tensor for fault in caught.value.faults]
    assert names == [f"{PATH}.{expert}.down_proj.weight" for expert in range(EXPERTS)]


def test_dtype_is_cast_in_stacked_experts_too(tmp_path):
    stacked = _stack(_make_separate())
    source = _write(tmp_path / "source", stacked)
    jaxwna16.quantize_checkpoint(
        source,
        tmp_path / "out",
        group_size=8,
        ignore=["re:.*experts"],
        dtype=ml_dtypes.bfloat16,
    )
    written = read_files(tmp_path / "out")
    for name, array in stacked.items():
        assert_same_bits(written[name], array.astype(ml_dtypes.bfloat16))
    assert {t.dtype for t in written.values() if t.is_floating_point()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts"] == EXPERTS
