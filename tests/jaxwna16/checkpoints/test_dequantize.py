"""`dequantize_checkpoint`: the floats that compressed-tensors makes of a folder."""

from __future__ import annotations

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxwna16
from jaxwna16 import CheckpointError, QuantSpec
from tests.checkpoints import (
    assert_same_bits,
    compress,
    decompress,
    make_args,
    make_weight,
    read_files,
    write_folder,
)
from tests.folders import make_config, make_tensors, prefix_names
from tests.folders import write_folder as write_raw_folder


def test_checkpoint_of_compressed_tensors_is_dequantized_bit_for_bit(tmp_path):
    modules = {}
    for i, (bits, group, symmetric) in enumerate([(4, 32, False), (8, -1, True), (8, 64, False)]):
        spec = QuantSpec(
            bits=bits, group_size=group, symmetric=symmetric, in_features=192, out_features=33
        )
        args = make_args(spec, ["float16", "bfloat16", "float32"][i])
        modules[f"model.layers.{i}.proj"] = compress(make_weight((33, 192), i), args), args
    source = write_folder(tmp_path / "source", modules)
    jaxwna16.dequantize_checkpoint(source, tmp_path / "out")
    dense = read_files(tmp_path / "out")
    assert dense.keys() == {f"{path}.weight" for path in modules}
    for path, (tensors, args) in modules.items():
        assert_same_bits(dense[f"{path}.weight"], decompress(tensors, args))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_dequantized_weight_too_large_for_the_dtype_is_refused(tmp_path):
    spec = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=64, out_features=9)
    scale = np.ones((9, 2), ml_dtypes.bfloat16)
    scale[4, 1] = 2.0**15  # twice that is more than the largest float16, 65504
    tensors = make_tensors(spec) | {"weight_scale": scale}
    source = write_raw_folder(tmp_path / "source", make_config(spec), [prefix_names("m", tensors)])
    jaxwna16.dequantize_checkpoint(source, tmp_path / "floats")
    weight = read_files(tmp_path / "floats")["m.weight"]
    count = int((weight.float().abs() > 65504).sum())
    assert count
    expected = f"m.weight: {count} of 576 values are too large for float16 .choose another dtype"
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {expected}"):
        jaxwna16.dequantize_checkpoint(source, tmp_path / "out", dtype=jnp.float16)
    assert not (tmp_path / "out").exists()


def test_bad_scales_of_every_module_are_listed_and_nothing_is_written(tmp_path):
    spec = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=64, out_features=9)
    bad = make_tensors(spec) | {"weight_scale": np.zeros((9, 2), np.float32)}
    modules = {"a": bad, "b": make_tensors(spec), "c": bad}
    tensors = {
        k: v for path, module in modules.items() for k, v in prefix_names(path, module).items()
    }
    source = write_raw_folder(tmp_path / "source", make_config(spec), [tensors])
    with pytest.raises(CheckpointError, match="18 of 18 scales are zero or not finite") as caught:
        jaxwna16.dequantize_checkpoint(source, tmp_path / "out")
    assert [fault.tensor for fault in caught.value.faults] == ["a.weight_scale", "c.weight_scale"]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
