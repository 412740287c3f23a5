"""The Linen model of the example has the checkpoint's tree, and the logits of `load_model`."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

import jaxwna16
from examples import linen_model


@pytest.mark.parametrize("name", ["packed", "packed_moe"])
def test_the_parameter_tree_is_the_checkpoints_tree(name, request):
    checkpoint = jaxwna16.load_checkpoint(request.getfixturevalue(name), dtype="float32")
    model = linen_model.LanguageModel(checkpoint.config, checkpoint.specs)
    made = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)  # noqa: E731
    assert shapes(made) == shapes(checkpoint.params)


@pytest.mark.parametrize("name", ["packed", "packed_moe"])
def test_its_logits_are_those_of_load_model(name, request, capsys, monkeypatch):
    monkeypatch.setattr(linen_model, "NEW_TOKENS", 4)
    linen_model.main([str(request.getfixturevalue(name)), "--prompt", "Once upon"])
    out = capsys.readouterr().out
    assert out.startswith("Once upon")
    # float32 sums in another order, of at most 96 products in 2 layers
    assert float(re.search(r"logits differ by (\S+)", out)[1]) < 1e-5
