"""A head in the files of a model whose head is the embedding: a copy of it, or refused."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxwna16 import (
    CheckpointError,
    QuantSpec,
    convert_checkpoint,
    load_model,
    quantize_checkpoint,
)
from jaxwna16.cli.main import main
from tests.checkpoints import compress, decompress, make_args
from tests.folders import describe_groups, prefix_names
from tests.jaxwna16.cli.checkpoints import edit_config, edit_tensors, write_float_checkpoint
from tests.jaxwna16.models.hf_models import forward

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKENS = jnp.arange(6, dtype=jnp.int32)[None]


@pytest.fixture
def folder(tmp_path):
    """Tied, and with a head that is another tensor."""
    write_float_checkpoint(tmp_path / "c")
    edit_config(tmp_path / "c", lambda config: config.update(tie_word_embeddings=True))
    return tmp_path / "c"


def test_a_head_that_differs_is_refused_where_transformers_unties_it(folder, capsys):
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not reference.lm_head.weight.equal(reference.model.embed_tokens.weight)
    expected = r"model.safetensors: lm_head.weight: differs from the embedding.* .set `tie_word_em"
    with pytest.raises(CheckpointError, match=expected):
        load_model(folder)
    assert main(["verify", str(folder)]) == 1
    assert "differs from the embedding" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["float", "quantized", "converted"])
def test_a_copy_is_left_out(folder, tmp_path, kind):
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].copy()}))
    if kind != "float":
        quantize_checkpoint(folder, tmp_path / "q", group_size=32, ignore_only=())
        folder = tmp_path / "q"
    with_copy = load_model(folder)
    if kind == "converted":
        convert_checkpoint(folder, tmp_path / "converted")
        with_copy = load_model(tmp_path / "converted")
    edit_tensors(folder, lambda tensors: tensors.pop(HEAD))
    np.testing.assert_array_equal(forward(with_copy, TOKENS), forward(load_model(folder), TOKENS))


def _pack(folder: Path, *, embedding: str) -> None:
    """Put a packed head into the folder; the embedding is the same, its floats, or others."""
    spec = QuantSpec(bits=8, group_size=64, symmetric=True, in_features=64, out_features=257)
    args = make_args(spec)
    targets = ["lm_head", "model.embed_tokens"]
    scheme = {"targets": targets, "weights": args.model_dump(mode="json")}
    described = describe_groups({"ends": scheme})
    edit_config(folder, lambda config: config.update(quantization_config=described))

    def edit(tensors: dict[str, np.ndarray]) -> None:
        del tensors[HEAD]
        roles = compress(torch.from_numpy(tensors[EMBEDDING]), args)
        arrays = {role: tensor.numpy() for role, tensor in roles.items()}
        tensors |= prefix_names("lm_head", arrays)
        if embedding == "packed":
            del tensors[EMBEDDING]
            tensors |= prefix_names("model.embed_tokens", arrays)
        elif embedding == "dequantized":
            tensors[EMBEDDING] = decompress(roles, args).numpy()

    edit_tensors(folder, edit)


def _remove_packed_head(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if name.startswith("lm_head.")]:
        del tensors[name]


@pytest.mark.parametrize("embedding", ["packed", "dequantized"])
def test_a_packed_copy_is_left_out(folder, tmp_path, embedding):
    _pack(folder, embedding=embedding)
    with_copy = load_model(folder)
    copy = tmp_path / "converted"
    convert_checkpoint(folder, copy)
    embeddings = [m.model.embed_tokens.weight[...] for m in (with_copy, load_model(copy))]
    edit_tensors(folder, _remove_packed_head)
    without = load_model(folder)
    assert with_copy.lm_head is None is without.lm_head
    for found in embeddings:
        np.testing.assert_array_equal(found, without.model.embed_tokens.weight[...])


def test_a_packed_head_that_only_rounds_the_embedding_is_refused_and_can_be_used(folder):
    _pack(folder, embedding="float")
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight_packed: differs .* .set `tie_word_em"
    ):
        load_model(folder)
    edit_config(folder, lambda config: config.update(tie_word_embeddings=False))
    assert load_model(folder).lm_head.spec.bits == 8
