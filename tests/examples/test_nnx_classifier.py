"""The classifier of the example: its layers compute what `load_model`'s do, and its head learns."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxwna16
from examples import nnx_classifier


def test_it_reads_as_the_model_that_its_layers_come_from(packed):
    checkpoint = jaxwna16.load_checkpoint(packed, dtype="float32")
    classifier = nnx_classifier.Classifier(checkpoint, 2, nnx.Rngs(0))
    model = jaxwna16.load_model(packed, dtype="float32")
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 256)
    count = jnp.full(2, 9)
    arguments = tokens, jnp.zeros_like(count), count, model.make_cache(2, 9)
    hidden, _ = jax.jit(lambda model, *arguments: model.hidden(*arguments))(model, *arguments)
    found = nnx.jit(lambda classifier, tokens: classifier.read(tokens))(classifier, tokens)
    # the last norm of this checkpoint has weights of 1; float32 sums in another order
    np.testing.assert_allclose(found, hidden[:, 1:].mean(1), atol=1e-5)


def test_mixed_passages_have_the_words_of_the_others(packed):
    tokenizer = jaxwna16.Tokenizer.from_folder(packed)
    text = " ".join(f"w{i:03}" for i in range(2000))  # 5 bytes a word
    tokens, kinds = nnx_classifier.make_passages(text, tokenizer)
    assert tokens.shape == (len(kinds), nnx_classifier.LENGTH)
    assert list(kinds[:4]) == [0, 1, 0, 1]
    assert (tokens[0::2, :5] == tokens[1::2, :5]).all()  # the first word stays
    assert (tokens[0::2] != tokens[1::2]).any()


@pytest.mark.usefixtures("usual_promotion")
def test_a_head_learns_what_features_tell():
    features = jax.random.normal(jax.random.key(0), (128, 64))
    kinds = (features[:, 3] > 0).astype(jnp.int32)
    head = nnx.Linear(64, 2, rngs=nnx.Rngs(0))
    nnx_classifier.train_head(head, features, kinds)
    assert (head(features).argmax(-1) == kinds).mean() > 0.9


@pytest.mark.usefixtures("usual_promotion")
def test_the_script_compares_two_heads(packed, capsys, monkeypatch):
    for name, value in (("TRAIN", 96), ("TEST", 32), ("STEPS", 10)):
        monkeypatch.setattr(nnx_classifier, name, value)
    nnx_classifier.main([str(packed), "--layers", "2"])
    rows = re.findall(
        r"(\d) layers: ([\d.]+)% right, of unseen .* ([\d.]+)%$", capsys.readouterr().out, re.M
    )
    assert [row[0] for row in rows] == ["0", "2"]
    assert all(20 < float(share) < 80 for row in rows for share in row[1:])  # weights are random
