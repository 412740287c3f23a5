"""Modules of the files that are several of the model: bit for bit the rows that they should be."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import jaxwna16
from jaxwna16.checkpoints.load import read_plan
from jaxwna16.cli.main import main
from jaxwna16.errors import ModelError
from jaxwna16.models.config.fused import Fused
from jaxwna16.models.filling import dividing
from jaxwna16.models.filling.fit import fit_model
from jaxwna16.models.filling.params import list_leaves
from jaxwna16.models.qwen3_5 import names as qwen3_5_names
from jaxwna16.models.qwen3_5.config import Qwen35Config
from loaders.files.folder import SINGLE
from loaders.modules.repack import encode, pack
from loaders.open import open_plan
from pallas_kernels.format.dequantize import dequantize
from pallas_kernels.format.rows import take_rows
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import check_weights
from tests.awq_gptq import describe_awq, describe_gptq, make_linear, pack_awq, pack_gptq
from tests.checkpoints import (
    assert_same_bits,
    compress,
    decompress,
    make_args,
    make_weight,
    pack_reordered,
    read_files,
    to_numpy,
)
from tests.folders import prefix_names, write_folder
from tests.jaxwna16.models.hf_checkpoints import write_folders
from tests.jaxwna16.models.hf_models import make_reference

# one compilation per shape: few examples, no deadline
PROPERTY = hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
QKVZ = "model.layers.0.linear_attn.in_proj_qkvz"


@st.composite
def kinds(draw) -> Fused:
    """Blocks of segments, of which one part may have several."""
    names = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=4))
    sizes = [draw(st.sampled_from([1, 3, 8, 32, 64, 65])) for _ in names]
    segments = tuple(zip(names, sizes, strict=True))
    kind = Fused(name="fused", segments=segments, blocks=draw(st.sampled_from([1, 2, 3])))
    hypothesis.assume(kind.rows > 8)  # compressed-tensors 0.20 trips over less at 4 bits
    return kind


def cut_by_definition(floats: torch.Tensor, kind: Fused) -> dict[str, torch.Tensor]:
    """The rows of each part, cut as transformers' own models cut outputs: viewed as blocks."""
    blocks = floats.reshape(kind.blocks, -1, *floats.shape[1:])
    pieces = torch.split(blocks, [size for _, size in kind.segments], dim=1)
    parts: dict[str, list[torch.Tensor]] = {}
    for (name, _), piece in zip(kind.segments, pieces, strict=True):
        parts.setdefault(name, []).append(piece.reshape(-1, *floats.shape[1:]))
    return {name: torch.cat(found) for name, found in parts.items()}


@PROPERTY
@hypothesis.given(
    kind=kinds(),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, -1]),
    symmetric=st.booleans(),
    reordered=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_parts_are_rows_of_what_compressed_tensors_decompresses(
    kind, bits, group_size, symmetric, reordered, seed
):
    facts = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    spec = QuantSpec(**facts, in_features=96, out_features=kind.rows)
    args = make_args(spec, "bfloat16")
    weight, encoding = make_weight((kind.rows, 96), seed), encode(spec)
    if reordered and spec.groups > 1:
        tensors, floats = pack_reordered(weight, args, seed)
        encoding = dataclasses.replace(encoding, reordered=True)
    else:
        tensors = compress(weight, args)
        floats = decompress(tensors, args)
    bias = torch.arange(kind.rows, dtype=torch.float32)
    arrays = {role: to_numpy(tensor) for role, tensor in tensors.items()}
    weights = pack(arrays | {"bias": bias.numpy()}, spec, encoding)
    expected, biases = cut_by_definition(floats, kind), cut_by_definition(bias, kind)
    assert kind.parts.keys() == expected.keys()
    for name, rows in kind.parts.items():
        own = QuantSpec(**facts, in_features=96, out_features=rows.size)
        part = take_rows(weights, spec, rows)
        check_weights(part, own)
        assert_same_bits(dequantize(part, own), expected[name])
        assert_same_bits(part["bias"], biases[name])
        assert part.get("perm") is weights.get("perm")  # one array for all
        # as compressed-tensors packs those rows by themselves, padding included
        if "perm" not in part:
            alone = compress(cut_by_definition(weight, kind)[name], args)
            direct = pack({role: to_numpy(tensor) for role, tensor in alone.items()}, own)
            jax.tree.map(assert_same_bits, {k: part[k] for k in direct}, direct)


@pytest.mark.parametrize("tool", ["awq", "gptq", "gptq, act-order"])
def test_parts_of_awq_and_gptq_are_rows_of_those_tools_floats(tool, tmp_path):
    linear = make_linear(96, 128, act_order=tool.endswith("act-order"))
    write, describe = (pack_awq, describe_awq) if tool == "awq" else (pack_gptq, describe_gptq)
    config = {"quantization_config": describe(linear)}
    write_folder(tmp_path / "c", config, [prefix_names("fused", write(linear))])
    checkpoint = jaxwna16.load_checkpoint(tmp_path / "c")
    spec, weights = checkpoint.specs["fused"], checkpoint.find("fused")
    kind = Fused(name="fused", segments=(("a", 8), ("b", 24), ("a", 16)), blocks=2)
    expected = cut_by_definition(linear.floats, kind)
    for name, rows in kind.parts.items():
        own = dataclasses.replace(spec, out_features=rows.size)
        assert_same_bits(dequantize(take_rows(weights, spec, rows), own), expected[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Qwen3-Next all of whose linears are packed."""
    spec = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=128, out_features=128)
    path = tmp_path_factory.mktemp("fused")
    return write_folders(make_reference("qwen3_next"), path, make_args(spec, "bfloat16")).packed


def write_changed(folder: Path, target: Path, tensors: dict[str, Any]) -> Path:
    """The same folder with other tensors."""
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / SINGLE)
    return target


def assert_same_leaves(model, other) -> None:
    leaves, others = list_leaves(model), list_leaves(other)
    assert leaves.keys() == others.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, others[path], err_msg=path)


def test_a_tree_keeps_the_modules_of_the_files_and_a_model_has_their_parts(folder):
    checkpoint = jaxwna16.load_checkpoint(folder)
    assert checkpoint.specs[QKVZ].out_features == checkpoint.config["linear_num_key_heads"] * (
        2 * checkpoint.config["linear_key_head_dim"] + 2 * 4 * 16
    )
    net = jaxwna16.load_model(folder).model.layers[0].linear_attn
    assert not hasattr(net, "in_proj_qkvz")
    for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"):
        assert isinstance(getattr(net, name), jaxwna16.QuantDense)


def test_a_converted_copy_is_the_same_model_and_reports_have_the_names_of_the_files(
    folder, tmp_path, capsys
):
    copy = tmp_path / "copy"
    jaxwna16.convert_checkpoint(folder, copy)
    assert_same_leaves(jaxwna16.load_model(copy), jaxwna16.load_model(folder))
    for path in (folder, copy):
        for command in ("inspect", "verify"):
            assert main([command, str(path), "--json"]) == 0
            text = capsys.readouterr().out
            assert 'in_proj_qkv"' not in text
            assert json.loads(text)["warnings"] == []
            assert command == "verify" or "linear_attn.in_proj_qkvz" in text


def test_dividing_takes_the_memory_of_one_module_beside_the_model(folder, monkeypatch):
    """What is divided goes, module by module, before the next one's parts are made."""
    plan = open_plan(folder)
    fit = fit_model(plan, dtype=None, backend=None)
    params = read_plan(fit.plan, dtype=fit.model.dtype, kept=fit.kept, progress=False).params
    sizes = [m.nbytes for path, m in plan.quantized.items() if path in fit.fused]
    assert len(sizes) == 2  # of one delta net
    taken, held = dividing.take_rows, []

    def record(*arguments):
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        return taken(*arguments)

    monkeypatch.setattr(dividing, "take_rows", record)
    fit.fill(params)
    assert len(held) == 4
    # scales and zero points are padded, and arrays of rows and the like are small
    assert max(held) - held[0] < 1.3 * max(sizes) + 20_000


def test_what_does_not_fit_is_named_as_in_the_files(folder, tmp_path):
    tensors = read_files(folder)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(QKVZ)}
    lacking = write_changed(folder, tmp_path / "lacking", rest)
    with pytest.raises(ModelError) as raised:
        jaxwna16.load_model(lacking)
    layer = QKVZ.removesuffix(".in_proj_qkvz")
    assert list(raised.value.reasons) == [
        f"{QKVZ}.weight: expected float32 [{n}, 128] for {layer}.{part}.weight, found nothing"
        for part, n in (("in_proj_qkv", 512), ("in_proj_z", 256))
    ]
    part = {f"{layer}.in_proj_z.weight": torch.zeros(256, 128)}
    with pytest.raises(ModelError, match=r"in_proj_z: expected it in .*in_proj_qkvz alone"):
        jaxwna16.load_model(write_changed(folder, tmp_path / "both", tensors | part))
    short = rest | {f"{QKVZ}.weight": torch.zeros(760, 128)}
    with pytest.raises(ModelError) as raised:
        jaxwna16.load_model(write_changed(folder, tmp_path / "short", short))
    assert list(raised.value.reasons) == [
        f"{QKVZ}: expected 768 rows (512 of in_proj_qkv, 256 of in_proj_z), found 760"
    ]


def test_a_module_with_a_fault_of_its_own_is_not_reported_as_missing(folder, tmp_path, capsys):
    tensors = read_files(folder)
    tensors[f"{QKVZ}.weight_scale"] = tensors[f"{QKVZ}.weight_scale"][:, :2]
    broken = write_changed(folder, tmp_path / "broken", tensors)
    assert main(["verify", str(broken), "--json"]) == 1
    faults = json.loads(capsys.readouterr().out)["error"]["faults"]
    assert [fault["tensor"] for fault in faults] == [f"{QKVZ}.weight_scale"]


def test_parts_that_files_have_by_themselves_need_no_dividing(folder, tmp_path):
    """As tools that split projections save them: floats of the same model, cut by definition."""
    jaxwna16.dequantize_checkpoint(folder, tmp_path / "floats", dtype="float32")
    whole = jaxwna16.load_model(tmp_path / "floats")
    assert isinstance(whole.config, Qwen35Config)
    tensors = read_files(tmp_path / "floats")
    kinds = qwen3_5_names.list_fused(whole.config)
    for kind in kinds:
        for name in [name for name in tensors if name.endswith(f"{kind.name}.weight")]:
            for part, rows in cut_by_definition(tensors.pop(name), kind).items():
                tensors[name.replace(kind.name.rpartition(".")[2], part)] = rows
    split = write_changed(tmp_path / "floats", tmp_path / "split", tensors)
    assert_same_leaves(jaxwna16.load_model(split), whole)
