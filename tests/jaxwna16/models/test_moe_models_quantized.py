"""What is particular to packed experts, loaded from real files; `test_families` has the logits.

compressed-tensors quantizes every expert and decompresses it again; transformers reads the
decompressed weights from a folder of their own.
"""

from __future__ import annotations

import functools
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import jaxwna16
from jaxwna16.errors import ModelError
from jaxwna16.generation.decoding import decode, make_options
from jaxwna16.generation.tokens import start_rows
from jaxwna16.models.llama.definition import Llama
from jaxwna16.models.parts.moe import FloatExperts
from pallas_kernels import QuantSpec
from tests.checkpoints import compress, decompress, make_args, make_scheme, read_files
from tests.jaxprs import find_kernels
from tests.jaxwna16.models.hf_checkpoints import Folders, load_reference, write_folders
from tests.jaxwna16.models.hf_models import (
    choose_experts,
    forward,
    make_reference,
    random_tokens,
    record_routers,
    reference_logits,
    relative_error,
)

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 64,
}
KINDS = [
    ("mixtral", 4, 32, False, "bfloat16"),
    ("mixtral", 8, 128, True, "float16"),
    ("qwen2_moe", 4, 64, True, "bfloat16"),
    ("glm4_moe, grouped", 4, 32, False, "float32"),
]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Makes the folders of a kind once; gives transformers' model, ours, and the folders."""

    @functools.cache
    def load(family, bits, group_size, symmetric, scale_dtype, down_bits=None):
        def describe(bits, group_size):
            spec = QuantSpec(
                bits=bits,
                group_size=group_size,
                symmetric=symmetric,
                in_features=128,
                out_features=128,
            )
            return make_args(spec, scale_dtype)

        reference = make_reference(family, **SIZES)
        down = None if down_bits is None else describe(down_bits, 32)
        folder = tmp_path_factory.mktemp("moe")
        folders = write_folders(reference, folder, describe(bits, group_size), down)
        return load_reference(folders), jaxwna16.load_model(folders.packed), folders

    return load


def test_gate_and_up_may_have_other_bits_and_groups_than_down(load):
    reference, model, _ = load("qwen3_moe", 4, 64, False, "bfloat16", 8)
    experts = model.model.layers[0].mlp.experts
    assert (experts.spec13.bits, experts.spec2.bits) == (4, 8)
    assert (experts.spec13.group_size, experts.spec2.group_size) == (64, 32)
    tokens = random_tokens(2, 24)
    error = relative_error(forward(model, jnp.asarray(tokens)), reference_logits(reference, tokens))
    assert error < 1e-4


def test_perplexity_is_that_of_the_decompressed_weights(load):
    reference, model, _ = load(*KINDS[0])
    tokens = random_tokens(4, 32)
    found = jaxwna16.measure_perplexity(model, tokens.ravel(), window=32, batch=2)
    logits = torch.from_numpy(reference_logits(reference, tokens))[:, :-1].flatten(0, 1).double()
    expected = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(tokens)[:, 1:].flatten().long()
    )
    assert found.nll == pytest.approx(expected.item(), rel=1e-5)


def test_no_float_copy_of_all_experts_is_made_in_the_decode_loop(load):
    _, model, _ = load(*KINDS[0])
    options = make_options(0.0, 0, 1.0, 0, ())
    progress, *_ = start_rows(model, [[1, 2, 3]], options, 16)
    program = decode.lower(model, progress, options, jnp.int32(1)).compile().as_text()
    assert re.search(r"u16\[8,", program)  # the stack, packed
    assert not re.search(r"(f32|bf16)\[8,(512,128|128,256)\]", program)
    carried = [line for line in program.splitlines() if re.search(r"\bwhile\(", line)]
    assert carried
    assert not any("f32[512,128]" in line or "f32[128,256]" in line for line in carried)


def test_in_decoding_a_sparse_layer_is_eight_kernels(load):
    """q/k/v, attention, o and its end, the choice, both products of the experts and their end."""
    _, _, folders = load(*KINDS[0])
    model = jaxwna16.load_model(folders.packed, dtype="bfloat16", backend="triton")
    one, cache = jnp.ones(1, jnp.int32), model.make_cache(1, 8)
    kernels = find_kernels(Llama.hidden, model, jnp.zeros((1, 1), jnp.int32), one, one, cache)
    assert len(kernels) == 8 * model.config.num_hidden_layers


def test_packed_routers_and_gates_and_experts_not_all_of_which_are_packed_are_floats(
    load, tmp_path
):
    """Layer 0 has one plain gate_proj between packed ones, layer 1 no packed down_proj."""
    _, _, whole = load(*KINDS[2])
    args = make_args(
        QuantSpec(bits=4, group_size=64, symmetric=True, in_features=128, out_features=128)
    )
    packed, floats = read_files(whole.packed), read_files(whole.floats)
    for path in [name.removesuffix(".weight") for name in packed if name.endswith("gate.weight")]:
        roles = compress(packed.pop(f"{path}.weight"), args)
        packed |= {f"{path}.{role}": tensor.contiguous() for role, tensor in roles.items()}
        floats[f"{path}.weight"] = decompress(roles, args).float()
    plain = re.compile(r"model\.layers\.(0\.mlp\.experts\.1\.gate|1\.mlp\.experts\.\d+\.down)_proj")
    for path in {match[0] for match in map(plain.match, packed) if match}:
        packed = {n: t for n, t in packed.items() if not n.startswith(f"{path}.")}
        packed[f"{path}.weight"] = floats[f"{path}.weight"].clone()
    folders = Folders(tmp_path / "packed", tmp_path / "floats")
    for folder, tensors in zip(folders, (packed, floats), strict=True):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((whole.packed / "config.json").read_text())
    quantization = config["quantization_config"] | {"ignore": ["lm_head"]}
    groups = {"routers": make_scheme(args, r"re:.*gate$").model_dump(mode="json")}
    quantization["config_groups"] |= groups
    config["quantization_config"] = quantization
    (folders.packed / "config.json").write_text(json.dumps(config))
    shutil.copy(whole.floats / "config.json", folders.floats)
    reference, model = load_reference(folders), jaxwna16.load_model(folders.packed)
    assert all(isinstance(layer.mlp.experts, FloatExperts) for layer in model.model.layers)
    mixed, whole_stacks = model.warnings
    assert mixed.startswith("model.layers.0.mlp.experts.w13: 15 of 16 matrices are packed")
    assert whole_stacks.startswith("model.layers.0.mlp.experts.w2 and 1 more stacks: expanded")
    tokens = random_tokens(2, 24)
    error = relative_error(forward(model, jnp.asarray(tokens)), reference_logits(reference, tokens))
    # float32 sums in another order; the routers before they were packed give more than 0.01
    assert error < 1e-4
    for layer, router in record_routers(reference, tokens).items():
        ids, _ = choose_experts(model, layer, router.hidden)
        np.testing.assert_array_equal(ids, router.ids)


def test_experts_keep_the_dtype_of_their_scales(load):
    _, model, _ = load(*KINDS[1])
    assert model.model.layers[0].mlp.experts.w13.scale.get_value().dtype == jnp.float16


def test_layers_that_predict_several_tokens_are_not_read(load, tmp_path):
    """Published GLM-4.5 has one past the last layer; transformers leaves it out, too."""
    _, model, folders = load(*KINDS[3])
    tensors = read_files(folders.packed)
    last, extra = "model.layers.1.", "model.layers.2."
    tensors |= {n.replace(last, extra): t.clone() for n, t in tensors.items() if last in n}
    tensors[f"{extra}eh_proj.weight"] = torch.zeros(128, 256)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folders.packed / "config.json", tmp_path)
    tokens = jnp.asarray(random_tokens(1, 8))
    longer = jaxwna16.load_model(tmp_path)
    np.testing.assert_array_equal(forward(longer, tokens), forward(model, tokens))
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, stray in (
        ({"num_nextn_predict_layers": 0}, "model.layers.2.mlp.experts.w13"),
        ({"num_hidden_layers": 1}, "model.layers.2.mlp.experts.w13"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=stray):
            jaxwna16.load_model(tmp_path)
