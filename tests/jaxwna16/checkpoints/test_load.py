"""`load_checkpoint`: params, specs and config of a folder that compressed-tensors wrote."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwna16
from jaxwna16 import CheckpointError, InputError, QuantSpec
from tests.checkpoints import (
    assert_same_bits,
    compress,
    decompress,
    make_args,
    make_weight,
    write_folder,
)
from tests.folders import make_config, make_tensors, prefix_names
from tests.folders import write_folder as write_raw_folder


def _make_spec(bits=4, group=32, symmetric=False) -> QuantSpec:
    return QuantSpec(
        bits=bits, group_size=group, symmetric=symmetric, in_features=96, out_features=33
    )


def test_modules_of_different_schemes_load_exactly(tmp_path):
    modules = {}
    for i, scheme in enumerate([(4, 32, False), (4, -1, True), (8, 32, True), (8, -1, False)]):
        args = make_args(_make_spec(*scheme), ["bfloat16", "float16", "float32"][i % 3])
        modules[f"model.layers.{i}.proj"] = compress(make_weight((33, 96), i), args), args
    checkpoint = jaxwna16.load_checkpoint(write_folder(tmp_path / "c", modules))
    assert checkpoint.folder == tmp_path / "c"
    assert checkpoint.specs.keys() == modules.keys()
    assert not checkpoint.warnings
    for i, (path, (tensors, args)) in enumerate(modules.items()):
        spec = checkpoint.specs[path]
        assert (spec.bits, spec.symmetric) == (args.num_bits, args.symmetric)
        weights = checkpoint.params["model"]["layers"][str(i)]["proj"]
        assert all(isinstance(leaf, jax.Array) for leaf in weights.values())
        assert_same_bits(jaxwna16.dequantize(weights, spec), decompress(tensors, args))


def test_params_multiply_where_they_stand(tmp_path):
    spec = _make_spec()
    tensors = prefix_names("m", make_tensors(spec) | {"bias": np.ones(33, np.float32)})
    checkpoint = jaxwna16.load_checkpoint(
        str(write_raw_folder(tmp_path / "c", make_config(spec), [tensors]))
    )
    y = jaxwna16.quant_matmul(jnp.zeros((2, 96)), checkpoint.params["m"], checkpoint.specs["m"])
    np.testing.assert_array_equal(y, np.ones((2, 33)))


def test_warnings_and_config_come_along(tmp_path):
    spec = _make_spec()
    config = make_config(spec, ignore=["lm_head"]) | {"tie_word_embeddings": False}
    folder = write_raw_folder(tmp_path / "c", config, [prefix_names("m", make_tensors(spec))])
    checkpoint = jaxwna16.load_checkpoint(folder)
    assert checkpoint.config == config
    assert any("'lm_head' matches no module" in warning for warning in checkpoint.warnings)


@pytest.mark.parametrize("visible", [True, False, None])
def test_bar_is_on_stderr_and_only_where_asked(tmp_path, capfd, visible):
    tensors = {"a": np.zeros(9, np.float32)}
    folder = write_raw_folder(tmp_path / "c", {}, [tensors])
    jaxwna16.load_checkpoint(folder, progress=visible)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("loading c" in err) == (visible is True)


def test_progress_may_be_a_function(tmp_path):
    calls = []
    folder = write_raw_folder(tmp_path / "c", {}, [{"a": np.zeros(9, np.float32)}])
    jaxwna16.load_checkpoint(folder, progress=lambda *call: calls.append(call))
    assert calls == [(36, 36, "a")]


def test_find_gives_a_part_of_the_tree_and_says_what_else_there_is(tmp_path):
    arrays = {name: np.ones(4, np.float32) for name in ("lm_head.weight", "model.norm.weight")}
    checkpoint = jaxwna16.load_checkpoint(write_raw_folder(tmp_path / "c", {}, [arrays]))
    assert checkpoint.find("model.norm.weight") is checkpoint.params["model"]["norm"]["weight"]
    assert checkpoint.find("model") is checkpoint.params["model"]
    for path, hint in (
        ("model.layers.0", "model has norm"),
        ("head", "the checkpoint has lm_head, model"),
        ("model.norm.weight.packed", "model.norm.weight is an array"),
    ):
        with pytest.raises(InputError, match=f"nothing at {path}\n  - {hint}$"):
            checkpoint.find(path)


@pytest.mark.parametrize("name", ["absent", "./a/b", "/absent/x", "a/b/c", "~/x"])
def test_path_that_is_not_there_is_no_hub_name(name):
    with pytest.raises(CheckpointError, match="this is not a folder"):
        jaxwna16.load_checkpoint(name)


def test_hub_name_that_cannot_be_fetched_is_an_error_of_ours():
    pytest.importorskip("huggingface_hub")
    with pytest.raises(
        InputError, match="nobody/nothing: no such folder, and the hub did not give"
    ):
        jaxwna16.load_checkpoint("nobody/nothing")


def test_every_error_of_ours_is_one_class_and_a_value_error():
    errors = (jaxwna16.SpecError, jaxwna16.BackendError, jaxwna16.ModelError, CheckpointError)
    for error in (*errors, InputError):
        assert issubclass(error, jaxwna16.Wna16Error)
        assert issubclass(error, ValueError)
