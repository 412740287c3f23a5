"""Models that embed texts: hidden states, and folders that were saved without a head."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import jaxwna16
from jaxwna16.cli.main import main
from jaxwna16.errors import InputError, ModelError
from jaxwna16.generation.tokens import generate_tokens
from pallas_kernels import QuantSpec
from tests.checkpoints import make_args
from tests.jaxwna16.cli.checkpoints import write_float_checkpoint
from tests.jaxwna16.models.hf_checkpoints import load_reference, write_folders
from tests.jaxwna16.models.hf_models import make_reference, random_tokens, relative_error


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A `Qwen3Model`, packed and as floats: names do not begin with `model.`."""
    spec = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=128, out_features=128)
    bare = make_reference("qwen3", num_hidden_layers=1).model
    return write_folders(bare, tmp_path_factory.mktemp("bare"), make_args(spec, "bfloat16"))


def test_hidden_states_of_a_folder_without_a_head_are_those_of_transformers(folders):
    names = load_file(folders.packed / "model.safetensors")
    assert not any(name.startswith(("model.", "lm_head")) for name in names)
    reference = load_reference(folders)
    model = jaxwna16.load_model(folders.packed, dtype="float32")
    assert isinstance(model.model.layers[0].mlp.up_proj, jaxwna16.QuantDense)
    [warning] = model.warnings
    assert "no lm_head" in warning
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens).long()).last_hidden_state.numpy()
    found = model.hidden_states(tokens)
    assert found.shape == (2, 12, model.config.hidden_size)
    assert relative_error(found, expected) < 1e-4
    # of a row that is filled up, nothing before its end changes
    shorter = np.concatenate([tokens[:, :9], np.zeros((2, 3), np.int32)], axis=1)
    assert relative_error(model.hidden_states(shorter)[:, :9], expected[:, :9]) < 1e-4


def test_without_a_head_there_are_no_logits_and_no_text(folders):
    model = jaxwna16.load_model(folders.packed)
    for refused in (
        lambda: model([[1, 2]]),
        lambda: generate_tokens(model, [[1, 2]], max_new_tokens=2),
        lambda: jaxwna16.measure_perplexity(model, np.arange(16), window=8),
    ):
        with pytest.raises(InputError, match=r"no head .* model\.hidden_states"):
            refused()


def test_with_tied_embeddings_such_a_folder_makes_logits(folders, tmp_path, capsys):
    """As Qwen3-Embedding-0.6B is published."""
    shutil.copy(folders.packed / "model.safetensors", tmp_path)
    config = json.loads((folders.packed / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = jaxwna16.load_model(tmp_path, dtype="float32")
    assert model.warnings == ()
    tokens = random_tokens(1, 8)
    hidden = model.hidden_states(tokens)
    expected = hidden @ model.model.embed_tokens.weight[...].T
    assert relative_error(model(tokens), np.asarray(expected)) < 1e-4
    assert main(["verify", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["checked"]


def test_a_head_that_is_missing_beside_a_whole_model_stays_a_fault(folders, tmp_path):
    tensors = load_file(folders.floats / "model.safetensors")
    save_file({f"model.{n}": t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    shutil.copy(folders.floats / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"lm_head\.weight: expected .* found nothing"):
        jaxwna16.load_model(tmp_path)


def test_the_example_of_the_page_on_models_runs(tmp_path):
    write_float_checkpoint(tmp_path / "checkpoint")
    text = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    [snippet] = [s for s in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "tile" in s]
    scope = {"jaxwna16": jaxwna16, "jnp": jnp}
    exec(snippet.replace("path/to", str(tmp_path)), scope)
    assert scope["similarity"].shape == (2, 2)
    np.testing.assert_allclose(np.diag(scope["similarity"]), 1, rtol=1e-5)


def test_hidden_states_take_what_a_call_takes(folders):
    model = jaxwna16.load_model(folders.floats)
    with pytest.raises(InputError, match=r"expected integers \[B, S\]"):
        model.hidden_states(jnp.zeros((1, 2)))
