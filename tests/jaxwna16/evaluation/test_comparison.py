"""Comparisons against NumPy and torch, on models small enough to read."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxwna16.comparison import measure_divergence
from jaxwna16.errors import ModelError


class Bigram(nnx.Module):
    """Logits from the last token alone."""

    def __init__(self, seed: int):
        table = np.random.default_rng(seed).normal(size=(37, 37)).astype(np.float32)
        self.table = nnx.Param(jnp.asarray(table))

    def __call__(self, tokens):
        return self.table[...][tokens]


TOKENS = np.random.default_rng(5).integers(0, 37, 16 * 9 + 5)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_divergence_is_that_of_torch(batch):
    first, other = Bigram(0), Bigram(1)
    found = measure_divergence(first, other, TOKENS, window=16, batch=batch)
    rows = TOKENS[: 16 * 9].reshape(9, 16)[:, :-1].ravel()
    ours, theirs = (
        torch.tensor(np.asarray(model.table[...])[rows], dtype=torch.float64)
        for model in (first, other)
    )
    expected = torch.nn.functional.kl_div(
        theirs.log_softmax(-1), ours.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert found.kl_divergence == pytest.approx(expected.item(), rel=1e-6)
    assert found.top1_agreement == (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    assert found.tokens == 9 * 15


def test_a_stride_compares_every_token_once():
    first, other = Bigram(0), Bigram(1)
    found = measure_divergence(first, other, TOKENS, window=16, stride=7)
    # one token is all that a bigram model sees, so windows do not matter
    whole = measure_divergence(first, other, TOKENS, window=len(TOKENS))
    assert found.tokens == whole.tokens == len(TOKENS) - 1
    assert found.kl_divergence == pytest.approx(whole.kl_divergence, rel=1e-6)
    assert found.top1_agreement == whole.top1_agreement


def test_a_model_agrees_with_itself():
    found = measure_divergence(Bigram(0), Bigram(0), TOKENS, window=16)
    assert (found.kl_divergence, found.top1_agreement) == (0.0, 1.0)


def test_logits_that_are_no_numbers_are_refused_in_either_model():
    sound, broken = Bigram(0), Bigram(0)
    broken.table[...] = broken.table[...].at[3].set(jnp.nan)
    for pair in ((sound, broken), (broken, sound), (broken, broken)):
        with pytest.raises(ModelError, match="divergences are not finite"):
            measure_divergence(*pair, TOKENS, window=16)


def test_no_divergence_is_negative():
    first, other = Bigram(0), Bigram(0)
    other.table[...] = other.table[...] * np.float32(1 + 3e-7)
    for begin in range(0, len(TOKENS) - 2):
        found = measure_divergence(first, other, TOKENS[begin : begin + 2], window=2)
        assert 0.0 <= found.kl_divergence < 1e-6


def test_an_impossible_token_diverges_only_where_the_first_finds_it_possible():
    first, other = Bigram(0), Bigram(0)
    other.table[...] = other.table[...].at[:, 3].set(-jnp.inf)
    assert measure_divergence(other, other, TOKENS, window=16).kl_divergence == 0.0
    assert measure_divergence(other, first, TOKENS, window=16).kl_divergence > 0.0
    with pytest.raises(ModelError, match="divergences are not finite"):
        measure_divergence(first, other, TOKENS, window=16)
