"""A head in the files of a model whose head is the embedding: a copy of it, or refused."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxwna16 import CheckpointError, convert_checkpoint, load_model, quantize_checkpoint
from jaxwna16.cli.main import main
from tests.jaxwna16.cli.checkpoints import edit_config, edit_tensors, write_float_checkpoint
from tests.jaxwna16.hf_models import forward

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
