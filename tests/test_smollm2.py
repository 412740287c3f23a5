"""The real model end to end: SmolLM2-135M-Instruct, quantized here, against transformers.

The reference weights are what compressed-tensors itself decompresses from our files, loaded into
transformers as ordinary floats. The model is fetched once into `.cache/`. Its first layers are run,
all of them with `make thorough`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jaxwna16
from jaxwna16.evaluation.perplexity import read_text
from jaxwna16.generation.tokens import generate_tokens
from jaxwna16.models.llama.definition import Llama
from tests.checkpoints import decompress, make_args, read_files
from tests.smollm2 import DEPTHS, compute_perplexity, write_layers

TEXT = Path(__file__).parents[1] / "examples" / "data" / "persuasion.txt"
WINDOW, WINDOWS = 128, 2


class Reference(NamedTuple):
    """Logits [WINDOWS, WINDOW, V] of the text, and 64 tokens after the prompt."""

    logits: np.ndarray
    greedy: list[int]


def make_reference(packed: Path) -> transformers.PreTrainedModel:
    """transformers' Llama in float32 on the weights that compressed-tensors decompresses."""
    tensors = read_files(packed)
    state = {name: t.float() for name, t in tensors.items() if name.endswith("norm.weight")}
    state["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float()
    for path, spec in jaxwna16.load_checkpoint(packed, progress=False).specs.items():
        module = {
            role: tensors[f"{path}.{role}"]
            for role in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
        }
        state[f"{path}.weight"] = decompress(module, make_args(spec)).float()
    config = transformers.AutoConfig.from_pretrained(packed)
    del config.quantization_config
    with torch.device("meta"):
        twin = transformers.LlamaForCausalLM(config).eval()
    # what no file holds is made anew, away from the meta device
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config)
    missing, unexpected = twin.load_state_dict(state, strict=False, assign=True)
    assert missing == ["lm_head.weight"]  # tied
    assert not unexpected
    twin.tie_weights()
    return twin


@pytest.fixture(scope="module", params=DEPTHS)
def layers(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def packed(layers, tmp_path_factory) -> Path:
    """W4A16 asymmetric, groups of 32, bfloat16 scales: the rounding of a scale's dtype counts."""
    folder = tmp_path_factory.mktemp("smollm2") / "W4A16-asym-g32"
    source = write_layers(layers, folder.with_name("floats"))
    jaxwna16.quantize_checkpoint(
        source, folder, bits=4, group_size=32, symmetric=False, dtype=jnp.bfloat16
    )
    return folder


@pytest.fixture(scope="module")
def tokens(packed) -> list[int]:
    text = read_text(TEXT)
    middle = text[len(text) // 2 : len(text) // 2 + 8 * WINDOW * WINDOWS]
    return jaxwna16.Tokenizer.from_folder(packed).encode(middle)[: WINDOW * WINDOWS]


@pytest.fixture(scope="module")
def prompt(packed) -> list[int]:
    return jaxwna16.Tokenizer.from_folder(packed).encode("The capital of France is")


@pytest.fixture(scope="module")
def model(packed) -> Llama:
    return jaxwna16.load_model(packed, dtype="float32")


@pytest.fixture(scope="module")
def theirs(packed, tokens, prompt) -> Reference:
    """What transformers makes of the same weights; its model is large, and not kept."""
    reference = make_reference(packed)
    with torch.inference_mode():
        logits = reference(torch.tensor(tokens).reshape(WINDOWS, WINDOW)).logits.numpy()
        greedy = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return Reference(logits, greedy[0, len(prompt) :].tolist())


@pytest.mark.thorough
def test_logits_in_bfloat16_keep_the_derived_tolerance(layers, packed, tokens, theirs):
    """docs/numerics.md: 17 roundings a layer, each 0.72 * 2^-8 / sqrt(3) of its value (rms)."""
    model = jaxwna16.load_model(packed, dtype="bfloat16")
    ours = jax.jit(lambda model, x: model(x))(model, jnp.asarray([tokens[:WINDOW]]))
    expected = theirs.logits[0].astype(np.float64)
    error = np.asarray(ours[0], np.float64) - expected
    relative = math.sqrt((error**2).mean() / (expected**2).mean())
    assert relative <= math.sqrt(17 * layers) * 0.72 * 2.0**-8 / math.sqrt(3)
    assert relative > 2.0**-9  # it was computed in bfloat16 at all


def test_logits_in_float32_equal_those_of_transformers(model, tokens, theirs):
    ours = jax.jit(lambda model, x: model(x))(model, jnp.asarray([tokens[:WINDOW]]))
    largest = np.abs(theirs.logits).max()
    assert np.abs(np.asarray(ours[0]) - theirs.logits[0]).max() <= 1e-4 * largest


def test_perplexity_agrees_to_four_digits(model, tokens, theirs):
    found = jaxwna16.measure_perplexity(model, tokens, window=WINDOW)
    expected = compute_perplexity(theirs.logits, tokens)
    assert found.perplexity == pytest.approx(expected, rel=5e-5)


def test_64_greedy_tokens_are_the_same(model, prompt, theirs):
    assert generate_tokens(model, [prompt], max_new_tokens=64).tokens[0] == theirs.greedy
