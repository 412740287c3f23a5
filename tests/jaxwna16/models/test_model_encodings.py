"""A model whose layers are packed in every way there is, against transformers on their floats."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from flax import nnx
from safetensors.torch import save_file

import jaxwna16
from jaxwna16.generation.tokens import generate_tokens
from tests.checkpoints import compress, decompress, make_scheme, pack_reordered
from tests.folders import describe_groups
from tests.jaxwna16.models.hf_models import (
    forward,
    list_tensors,
    make_reference,
    random_tokens,
    reference_logits,
    relative_error,
)

# projection -> bits, group size (None is a channel), symmetric, reordered
KINDS = {
    "q_proj": (3, 32, False, False),
    "k_proj": (4, 32, False, True),
    "v_proj": (8, None, True, False),
    "o_proj": (5, None, False, False),
    "gate_proj": (6, 32, True, False),
    "up_proj": (4, 32, True, True),
    "down_proj": (2, 32, False, False),
    "lm_head": (7, 64, False, False),
    "embed_tokens": (8, 32, False, False),
}


def _make_args(bits: int, group_size: int | None, symmetric: bool) -> QuantizationArgs:
    facts = {
        "num_bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "strategy": "channel" if group_size is None else "group",
        "scale_dtype": torch.bfloat16,
    }
    return QuantizationArgs.model_validate(facts)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The transformers model with the decompressed weights, and ours from the packed folder."""
    reference = make_reference("llama")
    folder: Path = tmp_path_factory.mktemp("encodings") / "packed"
    folder.mkdir()
    tensors, groups = {}, {}
    for name, tensor in list_tensors(reference):
        path = name.removesuffix(".weight")
        kind = KINDS.get(path.rpartition(".")[2])
        if kind is None:
            tensors[name] = tensor.detach().clone()
            continue
        *facts, reordered = kind
        args = _make_args(*facts)
        if reordered:
            roles, floats = pack_reordered(tensor.detach(), args, seed=len(groups))
        else:
            roles = compress(tensor.detach(), args)
            floats = decompress(roles, args)
        tensors |= {f"{path}.{role}": array.contiguous() for role, array in roles.items()}
        groups[path] = make_scheme(args, path).model_dump(mode="json")
        with torch.no_grad():
            tensor.copy_(floats.float())
    config = reference.config.to_dict() | {"quantization_config": describe_groups(groups)}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return reference, jaxwna16.load_model(folder, dtype="float32"), folder


def test_logits_are_those_of_the_decompressed_weights(loaded):
    reference, model, _ = loaded
    tokens = random_tokens(2, 24)
    error = relative_error(forward(model, jnp.asarray(tokens)), reference_logits(reference, tokens))
    # float32 sums in another order; a feature in a wrong place or group gives more than 0.1
    assert error < 1e-4


def test_each_layer_has_the_width_that_holds_its_bits_and_its_order(loaded):
    _, model, _ = loaded
    layer = model.model.layers[0]
    linears = {**vars(layer.self_attn), **vars(layer.mlp), "lm_head": model.lm_head}
    for name, (bits, _, _, reordered) in KINDS.items():
        if name == "embed_tokens":
            continue
        assert linears[name].spec.bits == (4 if bits <= 4 else 8)
        assert (linears[name].perm is not None) == reordered
    assert isinstance(model.model.embed_tokens.weight, nnx.Param)


def test_generation_runs_on_every_kind_of_layer(loaded):
    reference, model, _ = loaded
    prompt = random_tokens(1, 11)
    result = generate_tokens(model, [prompt[0].tolist()], max_new_tokens=16)
    with torch.no_grad():
        expected = reference.generate(
            torch.from_numpy(prompt).long(), max_new_tokens=16, do_sample=False
        )
    assert result.tokens[0] == expected[0, 11:].tolist()


def test_dequantizing_the_folder_gives_the_same_floats(loaded, tmp_path):
    reference, _, folder = loaded
    jaxwna16.dequantize_checkpoint(folder, tmp_path / "floats", dtype="float32")
    params = jaxwna16.load_checkpoint(tmp_path / "floats").params
    for name, tensor in list_tensors(reference):
        node = params
        for key in name.split("."):
            node = node[key]
        assert (torch.from_numpy(jnp.asarray(node).__array__().copy()) == tensor).all(), name
