"""What is particular to Qwen3.5, loaded from real files; `test_families` has the logits.

compressed-tensors quantizes the linears and decompresses them again; transformers reads the
decompressed weights from a folder of their own.
"""

from __future__ import annotations

import functools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import jaxwna16
from jaxwna16.checkpoints.convert import convert_checkpoint
from jaxwna16.errors import ModelError
from jaxwna16.models.filling.params import list_leaves
from pallas_kernels import QuantSpec
from tests.checkpoints import make_args, read_files
from tests.jaxprs import find_kernels
from tests.jaxwna16.models.family_rows.qwen3_5 import FOUR_LAYERS, USUAL
from tests.jaxwna16.models.hf_checkpoints import load_reference, write_folders
from tests.jaxwna16.models.hf_models import (
    forward,
    make_reference,
    random_tokens,
    reference_logits,
    relative_error,
    run_padded,
)

KINDS = {
    "dense": ("qwen3_5_text", 32, (), FOUR_LAYERS),
    "dense beside a tower": ("qwen3_5", 128, USUAL, {}),
    "experts": ("qwen3_5_moe_text", 32, USUAL, {}),
    "experts beside a tower": ("qwen3_5_moe", 128, ("re:.*visual.*",), {}),
}
"""Name -> model_type, group size of asymmetric int4, ignored modules, changes of the config."""
LENGTH = 257


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Makes the folders of a kind once; gives transformers' model, ours, and the folders."""

    @functools.cache
    def load(kind):
        model_type, group_size, ignore, changes = KINDS[kind]
        spec = QuantSpec(
            bits=4, group_size=group_size, symmetric=False, in_features=128, out_features=128
        )
        reference = make_reference(model_type, **changes)
        folder = tmp_path_factory.mktemp("hybrid")
        folders = write_folders(reference, folder, make_args(spec, "bfloat16"), ignore=ignore)
        return load_reference(folders), jaxwna16.load_model(folders.packed), folders

    return load


def assert_same_leaves(model, other) -> None:
    """Two models have the same arrays under the same paths."""
    leaves, others = list_leaves(model), list_leaves(other)
    assert leaves.keys() == others.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, others[path], err_msg=path)


@pytest.mark.thorough
def test_rows_of_one_token_and_of_many_chunks_are_those_of_the_decompressed_weights(load):
    reference, model, _ = load("dense")
    tokens, lengths = random_tokens(1, LENGTH), np.array([1, 7, 64, LENGTH])
    chunks = run_padded(model, np.repeat(tokens, len(lengths), axis=0), lengths, 64)
    for row, length in enumerate(lengths):
        expected = reference_logits(reference, tokens[:, :length])
        # float32 sums in another order
        assert relative_error(chunks[row : row + 1, :length], expected) < 1e-4
    whole = forward(model, jnp.asarray(tokens))
    assert relative_error(whole, reference_logits(reference, tokens)) < 1e-4


def test_the_tower_and_the_layers_that_predict_are_left_out_and_listed(load, tmp_path):
    _, model, folders = load("dense beside a tower")
    tensors = read_files(folders.packed)
    head = "model.language_model.layers.1."
    added = {n.replace(head, "mtp.layers.0."): t.clone() for n, t in tensors.items() if head in n}
    added = {name: tensor for name, tensor in added.items() if "weight_" not in name}
    added["mtp.fc.weight"] = torch.zeros(128, 256)
    save_file(tensors | added, tmp_path / "model.safetensors")
    shutil.copy(folders.packed / "config.json", tmp_path)
    longer = jaxwna16.load_model(tmp_path)
    assert_same_leaves(longer, model)
    reasons = "\n".join(longer.warnings)
    assert "the vision tower" in reasons
    assert "predicts several tokens at once" in reasons
    assert "the vision tower" in "\n".join(model.warnings)


def test_a_converted_copy_of_a_text_model_beside_a_tower_is_the_same_model(load, tmp_path):
    _, model, folders = load("experts beside a tower")
    convert_checkpoint(folders.packed, tmp_path / "copy")
    assert_same_leaves(jaxwna16.load_model(tmp_path / "copy"), model)


def test_quantized_and_ignored_modules_are_what_the_config_says(load):
    _, all_packed, _ = load("dense")
    _, usual, _ = load("experts")
    for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"):
        assert isinstance(
            getattr(all_packed.model.layers[0].linear_attn, name), jaxwna16.QuantDense
        )
        assert not isinstance(getattr(usual.model.layers[0].linear_attn, name), jaxwna16.QuantDense)
    assert isinstance(usual.model.layers[0].mlp.experts, jaxwna16.QuantMoE)


def test_parts_of_one_name_in_the_model_are_refused_by_name(load, tmp_path):
    _, _, folders = load("dense beside a tower")
    tensors = read_files(folders.packed)
    tensors["model.norm.weight"] = tensors["model.language_model.norm.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folders.packed / "config.json", tmp_path)
    with pytest.raises(ModelError) as raised:
        jaxwna16.load_model(tmp_path)
    [reason] = raised.value.reasons
    assert "model.language_model.norm.weight" in reason


def test_a_fault_names_the_tensor_as_the_file_does(load, tmp_path):
    _, _, folders = load("dense beside a tower")
    tensors = read_files(folders.packed)
    name = next(n for n in tensors if n.endswith("mlp.up_proj.weight_scale"))
    assert name.startswith("model.language_model.layers.")
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folders.packed / "config.json", tmp_path)
    with pytest.raises(jaxwna16.CheckpointError) as raised:
        jaxwna16.load_model(tmp_path)
    assert [fault.tensor for fault in raised.value.faults] == [name]


def test_in_decoding_every_quantized_linear_is_in_a_kernel(load):
    """Each product, and what follows it: the delta rule or attention, and the ends of two."""
    _, _, folders = load("dense")
    model = jaxwna16.load_model(folders.packed, dtype="bfloat16", backend="triton")
    cache = model.make_cache(1, 8)
    one = jnp.ones(1, jnp.int32)
    kernels = find_kernels(type(model).hidden, model, jnp.zeros((1, 1), jnp.int32), one, one, cache)
    assert len(kernels) == 7 * model.config.num_hidden_layers


def test_in_a_16_bit_model_decays_keep_the_digits_of_the_file(load):
    reference, _, folders = load("dense")
    model = jaxwna16.load_model(folders.packed, dtype="bfloat16")
    layer, theirs = model.model.layers[0].linear_attn, reference.model.layers[0].linear_attn
    np.testing.assert_array_equal(layer.A_log[...], theirs.A_log.detach().numpy())
    np.testing.assert_array_equal(layer.dt_bias[...], theirs.dt_bias.detach().numpy())
    assert layer.conv1d.weight[...].dtype == layer.norm.weight[...].dtype == jnp.bfloat16
    cache = model.make_cache(2, 16)
    assert [c.state.dtype for c in cache[:3]] == [jnp.float32] * 3
    assert cache[0].inputs.dtype == cache[3].k.dtype == jnp.bfloat16


def test_the_saved_config_of_transformers_says_what_the_class_has(load):
    _, model, folders = load("dense beside a tower")
    config = json.loads((folders.packed / "config.json").read_text())
    assert config["text_config"]["layer_types"] == [
        "full_attention" if full else "linear_attention" for full in model.config.is_full
    ]
    assert model.config.rotary_dim == 16
