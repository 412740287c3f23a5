"""LoRA of the example: adapters learn, and nothing else changes."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxwna16
from examples import lora

pytestmark = pytest.mark.usefixtures("usual_promotion")


def test_adapters_learn_and_packed_weights_stay(packed, tmp_path, capsys, monkeypatch):
    models = []
    load = jaxwna16.load_model
    monkeypatch.setattr(
        jaxwna16, "load_model", lambda *a, **k: models.append(load(*a, **k)) or models[0]
    )
    options = ["--steps", "30", "--length", "32", "--rate", "1e-2", "--rank", "4"]
    lora.main([str(packed), *options, "--out", str(tmp_path / "adapters.safetensors")])

    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    before, after = map(float, re.search(r"([\d.]+) -> ([\d.]+)", out).groups())
    # from 6.8 to about 4.2; a batch of another piece of the text is within 0.2
    assert losses[-1] < losses[0] - 1
    assert after < before / 4

    found = dict(nnx.to_flat_state(nnx.state(models[0], nnx.Not(nnx.LoRAParam))))
    expected = dict(nnx.to_flat_state(nnx.state(load(packed, dtype="float32"))))
    assert len(found) == len(expected)
    assert sum(path[-1] == "packed" for path in found) == 14
    for path, leaf in found.items():
        before_training = expected[tuple(name for name in path if name != "base_module")]
        np.testing.assert_array_equal(leaf[...], before_training[...])

    saved = load_file(tmp_path / "adapters.safetensors")
    assert len(saved) == 28
    assert saved["model.layers.1.mlp.down_proj.lora_a"].shape == (96, 4)
    assert all(array.any() for array in saved.values())


def test_the_optimizer_keeps_moments_of_adapters_only(packed):
    model = jaxwna16.load_model(packed, dtype="float32")
    assert lora.attach_adapters(model, 4) == 14
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)
    adapters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    moments = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.ndim)
    assert moments == 2 * adapters


def test_gradients_pass_packed_products_as_they_pass_float_ones(packed, tmp_path):
    jaxwna16.dequantize_checkpoint(packed, tmp_path / "floats")
    rows = jax.random.randint(jax.random.key(0), (2, 12), 0, 256)
    embedding = nnx.DiffState(0, nnx.PathContains("embed_tokens"))
    gradients = []
    for folder, backend in ((packed, "xla"), (tmp_path / "floats", None)):
        model = jaxwna16.load_model(folder, dtype="float32", backend=backend)
        gradient = nnx.jit(nnx.grad(lora.compute_loss, argnums=embedding))(model, rows)
        gradients.append(np.asarray(jax.tree.leaves(gradient)[0]))
    largest = np.abs(gradients[1]).max()
    assert largest > 0
    # float32 sums in another order, through 14 products and back
    np.testing.assert_allclose(gradients[0] / largest, gradients[1] / largest, atol=1e-4)


def test_adapters_keep_the_dtype_of_the_model(packed):
    model = jaxwna16.load_model(packed, dtype="bfloat16")
    lora.attach_adapters(model, 4)
    one = jnp.ones(1, jnp.int32)
    cache = model.make_cache(1, 8)
    hidden, _ = jax.eval_shape(model.hidden, one[None], one, one, cache)
    assert hidden.dtype == jnp.bfloat16
