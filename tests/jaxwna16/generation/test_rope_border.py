"""Generation across the length at which longrope takes its long factors, against transformers.

transformers decides for a whole batch, by its longest row; so each row is compared by itself.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxwna16.generation import tokens as generation
from jaxwna16.generation.tokens import generate_tokens
from tests.jaxwna16.models.family_rows.llama import longrope
from tests.jaxwna16.models.hf_models import (
    convert,
    forward,
    make_reference,
    random_tokens,
    reference_logits,
    relative_error,
    run_hidden,
    run_logits,
)

LIMIT = 16
LENGTHS = (3, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 4)
NEW = 20


@pytest.fixture(scope="module")
def reference():
    return make_reference("phi3, longrope past its length", **longrope(LIMIT))


@pytest.fixture(scope="module")
def model(reference):
    return convert(reference)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [random_tokens(length, seed=length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(reference, prompts) -> list[list[int]]:
    """What transformers' own `generate` finds for each prompt."""
    found = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            whole = reference.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=NEW,
                do_sample=False,
            )
        found.append(whole[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 5}, {"stream": lambda rows: None}])
def test_rows_that_cross_the_border_go_on_as_in_transformers(model, prompts, expected, options):
    result = generate_tokens(model, prompts, max_new_tokens=NEW, **options)
    assert result.tokens == expected
    assert all(len(set(row)) > 3 for row in expected)  # no loop of a few tokens


def test_without_running_them_again_other_tokens_would_come(model, prompts, expected, monkeypatch):
    monkeypatch.setattr(generation.Border, "cross", lambda self, model, progress, done: progress)
    found = generate_tokens(model, prompts, max_new_tokens=NEW).tokens
    same = [ours == theirs for ours, theirs in zip(found, expected, strict=True)]
    assert same[3:] == [True, True]  # beyond it from their first token on
    assert not all(same[:3])


@pytest.mark.parametrize("length", [1, LIMIT, LIMIT + 1, 64])
def test_logits_on_both_sides_of_the_border_are_those_of_transformers(model, reference, length):
    tokens = random_tokens(2, length)
    theirs = reference_logits(reference, tokens)
    assert relative_error(forward(model, jnp.asarray(tokens)), theirs) < 1e-4
    # in pieces, which are told of the whole row
    cache, pieces = model.make_cache(2, length), []
    whole = jnp.full(2, length, jnp.int32)
    for begin in range(0, length, 16):
        piece = jnp.asarray(tokens[:, begin : begin + 16])
        count = jnp.full(2, piece.shape[1], jnp.int32)
        start = jnp.full(2, begin, jnp.int32)
        hidden, cache = run_hidden(model, piece, start, count, cache, whole)
        pieces.append(hidden)
    found = run_logits(model, jnp.concatenate(pieces, axis=1))
    assert relative_error(found, theirs) < 1e-4


def test_a_row_that_is_filled_up_past_the_border_is_told_where_it_ends(model, reference):
    tokens = random_tokens(2, 24)
    short = reference_logits(reference, tokens[:1, :10])
    found = forward(model, jnp.asarray(tokens), jnp.array([10, 24], jnp.int32))
    assert relative_error(found[:1, :10], short) < 1e-4
    assert relative_error(found[1:], reference_logits(reference, tokens[1:])) < 1e-4
    assert relative_error(forward(model, jnp.asarray(tokens))[:1, :10], short) > 0.01


def test_the_attention_factor_holds_for_short_rows_as_well(reference):
    """Of equal factors, rows of up to the limit differ by it alone."""
    tokens = random_tokens(1, LIMIT)
    other = make_reference(
        "phi3, longrope past its length", **longrope(LIMIT, attention_factor=1.0)
    )
    other.load_state_dict(reference.state_dict())
    logits = reference_logits(reference, tokens)
    assert relative_error(reference_logits(other, tokens), logits) > 0.01
    ours = forward(convert(other), jnp.asarray(tokens))
    assert relative_error(ours, reference_logits(other, tokens)) < 1e-4
    assert np.isfinite(logits).all()
