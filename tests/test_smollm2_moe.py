"""Experts with real weights: Mixtrals made of SmolLM2-135M-Instruct, against transformers.

With experts that differ only in the order of their neurons, logits must be those of the dense
model. With experts that were perturbed differently, perplexity must be transformers', before and
after quantization; after it, the reference weights are what compressed-tensors decompresses from
our files, expert by expert. To keep it short there are three experts, two windows of text and the
first layers; `make thorough` takes all layers.
"""

from __future__ import annotations

import gc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jaxwna16
from examples.fetch_smollm2 import fetch
from examples.make_moe import make_moe
from jaxwna16.evaluation.perplexity import read_text
from tests.checkpoints import decompress, make_args, read_files
from tests.smollm2 import DEPTHS, compute_perplexity

TEXT = Path(__file__).parents[1] / "examples" / "data" / "persuasion.txt"
WINDOW, WINDOWS = 128, 2
EXPERTS = 3

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    text = read_text(TEXT)
    middle = text[len(text) // 2 : len(text) // 2 + 8 * WINDOW * WINDOWS]
    return jaxwna16.Tokenizer.from_folder(fetch()).encode(middle)[: WINDOW * WINDOWS]


@pytest.fixture(scope="module", params=DEPTHS)
def layers(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def perturbed(layers, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "perturbed"
    return make_moe(fetch(), folder, experts=EXPERTS, noise=0.5, layers=layers)


@pytest.fixture(scope="module")
def packed(perturbed) -> Path:
    """W4A16 asymmetric, groups of 32; the routers stay as they are."""
    folder = perturbed.with_name("W4A16-asym-g32")
    jaxwna16.quantize_checkpoint(perturbed, folder, bits=4, group_size=32, symmetric=False)
    return folder


def run_transformers(model: transformers.PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """Float32 logits [windows, WINDOW, V], window by window."""
    with torch.inference_mode():
        rows = torch.tensor(tokens).reshape(-1, WINDOW)
        return torch.cat([model.eval()(row[None]).logits for row in rows]).numpy()


def decompress_mixtral(folder: Path, layers: int) -> transformers.MixtralForCausalLM:
    """transformers' Mixtral with the weights that compressed-tensors decompresses, one by one."""
    tensors = read_files(folder)
    floats = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight")}
    spec = jaxwna16.QuantSpec(
        bits=4, group_size=32, symmetric=False, in_features=576, out_features=1536
    )
    roles = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    for path in (n.removesuffix("_packed") for n in tensors if n.endswith(".weight_packed")):
        module = {role: tensors[path.removesuffix("weight") + role] for role in roles}
        floats[path] = decompress(module, make_args(spec)).float()
    state = {n.replace(".block_sparse_moe.", ".mlp."): t for n, t in floats.items()}
    for layer in range(layers):
        path = f"model.layers.{layer}.mlp.experts"
        w1, w2, w3 = (
            [state.pop(f"{path}.{expert}.{name}.weight") for expert in range(EXPERTS)]
            for name in ("w1", "w2", "w3")
        )
        joined = [torch.cat(pair) for pair in zip(w1, w3, strict=True)]
        state |= {f"{path}.gate_up_proj": torch.stack(joined), f"{path}.down_proj": torch.stack(w2)}
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.MixtralForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"]  # tied
    assert not unexpected
    model.tie_weights()
    return model


def test_experts_that_are_the_dense_ffn_give_the_dense_models_logits(tmp_path, tokens):
    """With the first four layers, which have every kind of tensor of all thirty."""
    row = tokens[:WINDOW]
    dense = transformers.LlamaForCausalLM.from_pretrained(
        fetch(), dtype="float32", num_hidden_layers=4
    )
    expected = run_transformers(dense, row)
    del dense
    gc.collect()
    folder = make_moe(fetch(), tmp_path / "moe", experts=EXPERTS, layers=4)
    model = jaxwna16.load_model(folder)
    ours = np.asarray(jax.jit(lambda model, x: model(x))(model, jnp.asarray([row])))
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.thorough
def test_perplexity_of_perturbed_experts_agrees_to_four_digits(perturbed, tokens):
    reference = transformers.MixtralForCausalLM.from_pretrained(perturbed, dtype="float32")
    logits = run_transformers(reference, tokens)
    del reference
    gc.collect()
    expected = compute_perplexity(logits, tokens)
    model = jaxwna16.load_model(perturbed)
    found = jaxwna16.measure_perplexity(model, tokens, window=WINDOW).perplexity
    assert found == pytest.approx(expected, rel=5e-5)
    # had it chosen the other experts, it would show
    for layer in model.model.layers:
        gate = layer.mlp.gate.weight
        gate.set_value(-gate[...])
    other = jaxwna16.measure_perplexity(model, tokens, window=WINDOW).perplexity
    assert abs(other / expected - 1) > 0.01


@pytest.mark.thorough  # half a minute; small models of every family are always compared
def test_packed_experts_give_logits_and_perplexity_of_their_floats(layers, packed, tokens):
    reference = decompress_mixtral(packed, layers)
    logits = run_transformers(reference, tokens)
    del reference
    gc.collect()
    model = jaxwna16.load_model(packed)
    assert isinstance(model.model.layers[-1].mlp.experts, jaxwna16.QuantMoE)
    rows = jnp.asarray(tokens).reshape(-1, WINDOW)
    ours = np.array(jax.jit(lambda model, x: model(x))(model, rows))
    assert np.abs(ours - logits).max() <= 1e-4 * np.abs(logits).max()
    found = compute_perplexity(ours, tokens)
    assert found == pytest.approx(compute_perplexity(logits, tokens), rel=5e-5)
