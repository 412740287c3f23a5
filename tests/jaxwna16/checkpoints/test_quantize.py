"""`quantize_checkpoint`: folders as compressed-tensors reads them, and back to floats again."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

import jaxwna16
from jaxwna16 import CheckpointError, InputError, QuantSpec
from tests.checkpoints import (
    assert_same_bits,
    compress,
    decompress,
    make_args,
    make_weight,
    read_files,
)
from tests.folders import make_config, make_tensors, prefix_names
from tests.folders import write_folder as write_raw_folder
from tests.grids import cover

LINEARS = {"model.layers.0.q_proj": (40, 64), "model.layers.0.up_proj": (33, 128)}


def _write_source(folder: Path, dtype=np.float32, **config) -> Path:
    tensors = {
        f"{path}.weight": make_weight(shape).numpy().astype(dtype)
        for path, shape in LINEARS.items()
    }
    tensors |= {
        "model.layers.0.q_proj.bias": np.linspace(-1, 1, 40).astype(dtype),
        "model.embed_tokens.weight": make_weight((50, 64)).numpy().astype(dtype),
        "model.norm.weight": np.ones(64, dtype),
        "lm_head.weight": make_weight((50, 64), 1).numpy().astype(dtype),
        "steps": np.array([2**40]),
    }
    write_raw_folder(folder, {"model_type": "llama", "dtype": "float32"} | config, [tensors])
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "dtype"),
    cover(
        [(4, 32, False), (4, 64, True), (8, -1, False), (8, 32, True)],
        [np.float32, ml_dtypes.bfloat16, np.float16],
    ),
)
def test_quantized_folder_is_read_by_compressed_tensors_with_the_same_result(
    tmp_path, bits, group, symmetric, dtype
):
    source = _write_source(tmp_path / "source", dtype)
    out, floats = tmp_path / "out", tmp_path / "floats"
    jaxwna16.quantize_checkpoint(source, out, bits=bits, group_size=group, symmetric=symmetric)
    jaxwna16.dequantize_checkpoint(out, floats)
    tensors, dense = read_files(out), read_files(floats)
    checkpoint = jaxwna16.load_checkpoint(out)
    raw = json.loads((out / "config.json").read_text())["quantization_config"]
    [scheme] = QuantizationConfig.model_validate(raw).config_groups.values()
    assert checkpoint.specs.keys() == LINEARS.keys()
    for path, spec in checkpoint.specs.items():
        roles = {k.removeprefix(f"{path}."): v for k, v in tensors.items() if k.startswith(path)}
        bias = roles.pop("bias", None)
        expected = decompress(roles, scheme.weights)
        node = checkpoint.params
        for key in path.split("."):
            node = node[key]
        weights = {name: leaf for name, leaf in node.items() if name != "bias"}
        assert_same_bits(jaxwna16.dequantize(weights, spec), expected)
        assert_same_bits(dense[f"{path}.weight"], expected)
        assert dense[f"{path}.weight"].dtype == expected.dtype
        if bias is not None:
            assert_same_bits(dense[f"{path}.bias"], bias)


@pytest.mark.parametrize("symmetric", [True, False])
def test_tensors_are_those_that_compressed_tensors_would_write(tmp_path, symmetric):
    source = _write_source(tmp_path / "source")
    jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=32, symmetric=symmetric)
    tensors = read_files(tmp_path / "out")
    for path, (n, k) in LINEARS.items():
        spec = QuantSpec(bits=4, group_size=32, symmetric=symmetric, in_features=k, out_features=n)
        for role, tensor in compress(make_weight((n, k)), make_args(spec, "float32")).items():
            assert_same_bits(tensors[f"{path}.{role}"], tensor)


def test_everything_else_is_kept_as_it_was(tmp_path):
    source = _write_source(tmp_path / "source", tie_word_embeddings=False)
    jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=32)
    before, after = read_files(source), read_files(tmp_path / "out")
    kept = {name for name in before if name.removesuffix(".weight") not in LINEARS}
    assert {name for name in after if ".weight_" not in name} == kept
    for name in kept:
        assert_same_bits(after[name], before[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["ignore"] == ["lm_head"]
    assert config == json.loads((source / "config.json").read_text())
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "ignore", [["re:.*up_proj"], ["model.layers.0.up_proj"], ["re:model.*up_proj"]]
)
def test_ignored_modules_stay_floats_and_stand_in_the_config_beside_the_default(tmp_path, ignore):
    source = _write_source(tmp_path / "source")
    jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=32, ignore=ignore)
    checkpoint = jaxwna16.load_checkpoint(tmp_path / "out")
    assert checkpoint.specs.keys() == {"model.layers.0.q_proj"}
    # a path, too, where a tool that calls the model otherwise could not translate the pattern
    path = [] if ignore == ["re:.*up_proj"] else ["model.layers.0.up_proj"]
    expected = list(dict.fromkeys(["lm_head", *ignore, *path]))
    assert checkpoint.config["quantization_config"]["ignore"] == expected
    assert not checkpoint.warnings


def test_a_head_can_be_quantized_and_a_tied_one_is_ignored(tmp_path):
    source = _write_source(tmp_path / "source")
    jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=32, ignore_only=())
    assert "lm_head" in jaxwna16.load_checkpoint(tmp_path / "out").specs
    tied = _write_source(tmp_path / "tied", tie_word_embeddings=True)
    jaxwna16.quantize_checkpoint(tied, tmp_path / "out2", group_size=32, ignore_only=())
    checkpoint = jaxwna16.load_checkpoint(tmp_path / "out2")
    assert checkpoint.config["quantization_config"]["ignore"] == ["lm_head"]
    assert checkpoint.specs.keys() == LINEARS.keys()


def test_dtype_casts_first_when_quantizing_and_last_when_dequantizing(tmp_path):
    source = _write_source(tmp_path / "source")
    jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=32, dtype=jnp.bfloat16)
    tensors = read_files(tmp_path / "out")
    floats = {name: t.dtype for name, t in tensors.items() if t.is_floating_point()}
    assert set(floats.values()) == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    direct = _write_source(tmp_path / "narrow", ml_dtypes.bfloat16)
    jaxwna16.quantize_checkpoint(direct, tmp_path / "out2", group_size=32)
    for name, tensor in read_files(tmp_path / "out2").items():
        assert_same_bits(tensors[name], tensor)
    jaxwna16.dequantize_checkpoint(tmp_path / "out", tmp_path / "a")
    jaxwna16.dequantize_checkpoint(tmp_path / "out", tmp_path / "b", dtype=jnp.float32)
    for name, tensor in read_files(tmp_path / "a").items():
        wide = tensor.float() if tensor.is_floating_point() else tensor
        assert_same_bits(read_files(tmp_path / "b")[name], wide)


def test_every_weight_that_the_group_does_not_divide_is_listed(tmp_path):
    source = _write_source(tmp_path / "source")
    with pytest.raises(CheckpointError) as caught:
        jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=48)
    assert [fault.tensor for fault in caught.value.faults] == [f"{path}.weight" for path in LINEARS]
    assert all("group_size must divide" in fault.what for fault in caught.value.faults)
    assert not (tmp_path / "out").exists()


def test_weight_that_is_not_finite_is_named_and_nothing_is_written(tmp_path):
    source = _write_source(tmp_path / "source")
    bad = {"m.weight": np.full((4, 64), np.nan, np.float32)}
    bad_source = write_raw_folder(tmp_path / "bad", {}, [bad])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: m\.weight: w holds NaN"):
        jaxwna16.quantize_checkpoint(bad_source, tmp_path / "out", group_size=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "source"]
    assert source.exists()


def test_value_too_large_for_the_dtype_is_refused_and_not_made_infinite(tmp_path):
    tensors = {
        "norm.weight": np.array([1e6, 1], np.float32),
        "m.weight": make_weight((4, 64)).numpy(),
    }
    source = write_raw_folder(tmp_path / "source", {}, [tensors])
    with pytest.raises(
        CheckpointError, match=r"norm.weight: 1 of 2 values are too large for float16"
    ):
        jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=32, dtype=jnp.float16)


def test_what_cannot_be_quantized_is_refused(tmp_path):
    source = _write_source(tmp_path / "source")
    with pytest.raises(InputError, match="no linear weight is left to quantize"):
        jaxwna16.quantize_checkpoint(source, tmp_path / "out", ignore=["re:.*"])
    jaxwna16.quantize_checkpoint(source, tmp_path / "q", group_size=32)
    with pytest.raises(CheckpointError, match="2 modules are quantized already"):
        jaxwna16.quantize_checkpoint(tmp_path / "q", tmp_path / "out")
    with pytest.raises(CheckpointError, match="the destination exists already"):
        jaxwna16.quantize_checkpoint(source, tmp_path / "q", group_size=32)
    with pytest.raises(InputError, match="no module is quantized"):
        jaxwna16.dequantize_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ignore": "lm_head"}, "ignore: expected a list of modules, got the text 'lm_head'"),
        ({"ignore": ["lm_hed"]}, "'lm_hed' names no module"),
        ({"ignore_only": ["lm_hed"]}, "'lm_hed' names no module"),
        ({"ignore": [""]}, "'' names no module"),
        ({"ignore": ["lm_head"], "ignore_only": []}, "ignore_only replaces it: give one"),
        ({"ignore": ["re:q_proj"]}, "'re:q_proj' names no module"),
        ({"ignore": ["re:("]}, "'re:.' is not a regular expression"),
        ({"bits": 3}, "bits must be one of"),
        ({"group_size": 0}, "group_size"),
        ({"dtype": "float64"}, "dtype must be float32, bfloat16 or float16, got float64"),
        ({"dtype": "nonsense"}, "dtype must be float32, bfloat16 or float16, got .nonsense"),
    ],
)
def test_arguments_that_cannot_be_followed_are_refused(tmp_path, options, reason):
    source = _write_source(tmp_path / "source")
    with pytest.raises(InputError, match=reason):
        jaxwna16.quantize_checkpoint(source, tmp_path / "out", **{"group_size": 32} | options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pos_embed", "embeddings.token_type_embeddings", "embed_in"])
def test_every_embedding_is_left_alone(tmp_path, name):
    tensors = {f"{path}.weight": make_weight((64, 64)).numpy() for path in (name, "a.up_proj")}
    source = write_raw_folder(tmp_path / "source", {}, [tensors])
    jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=32)
    assert jaxwna16.load_checkpoint(tmp_path / "out").specs.keys() == {"a.up_proj"}


def test_a_head_without_a_tensor_is_ignored_whatever_ties_it(tmp_path):
    """The default of transformers' class does it for some models."""
    tensors = {"a.up_proj.weight": make_weight((64, 64)).numpy()}
    source = write_raw_folder(tmp_path / "source", {}, [tensors])
    jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=32, ignore_only=())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


def test_parts_of_a_config_change_as_the_whole_does(tmp_path):
    """A model beside a vision tower says in `text_config` how it is quantized, and its dtype."""
    spec = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=64, out_features=9)
    text = make_config(spec) | {"dtype": "float32", "hidden_size": 64}
    tensors = prefix_names("m", make_tensors(spec))
    source = write_raw_folder(tmp_path / "q", {"text_config": text, "vision_config": {}}, [tensors])
    jaxwna16.dequantize_checkpoint(source, tmp_path / "floats", dtype="bfloat16")
    config = json.loads((tmp_path / "floats" / "config.json").read_text())
    expected = {"dtype": "bfloat16", "hidden_size": 64}
    assert config == {"text_config": expected, "vision_config": {}}
    jaxwna16.quantize_checkpoint(tmp_path / "floats", tmp_path / "again", group_size=32)
    assert not jaxwna16.load_checkpoint(tmp_path / "again").warnings
