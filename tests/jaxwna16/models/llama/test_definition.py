"""What a Llama does with tokens, rows and its cache; `test_families` has the logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwna16.errors import InputError
from jaxwna16.models.llama.definition import Llama
from tests.jaxwna16.models.hf_models import (
    convert,
    forward,
    make_reference,
    random_tokens,
    run_hidden,
    run_pieces,
)

LENGTH = 24


@pytest.mark.thorough
def test_a_row_under_dynamic_rope_does_not_depend_on_its_neighbours():
    """transformers turns all rows of a batch by the longest, and is no oracle here."""
    model = convert(make_reference("llama, dynamic rope past its length"))
    lengths = np.array([5, LENGTH, 17, 0], np.int32)
    tokens, start = random_tokens(4, LENGTH), jnp.zeros(4, jnp.int32)
    together, _ = run_hidden(
        model, jnp.asarray(tokens), start, jnp.asarray(lengths), model.make_cache(4, LENGTH)
    )
    for row, length in enumerate(lengths[:3]):
        alone = run_pieces(model, tokens[row : row + 1, :length], [length], slots=LENGTH)
        np.testing.assert_allclose(together[row, :length], alone[0], rtol=2e-4, atol=2e-5)


def test_padding_leaves_the_cache_as_it_is():
    model = convert(make_reference("qwen2, second layer sliding"))
    tokens = jnp.asarray(random_tokens(3, 4))
    start, count = jnp.array([2, 0, 6], jnp.int32), jnp.array([3, 0, 2], jnp.int32)
    before = jax.tree.map(lambda x: x + 7, model.make_cache(3, 8))
    _, after = run_hidden(model, tokens, start, count, before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        changed = np.asarray(old != new).reshape(3, 2, 8, -1).any(axis=(1, 3))
        expected = [[2 <= s < 5 for s in range(8)], [False] * 8, [s >= 6 for s in range(8)]]
        np.testing.assert_array_equal(changed, expected)


def test_what_is_behind_a_token_does_not_change_its_logits():
    model = convert(make_reference("llama"))
    tokens = random_tokens(1, LENGTH)
    other = tokens.copy()
    other[:, 10:] = (other[:, 10:] + 1) % 128
    first, second = forward(model, jnp.asarray(tokens)), forward(model, jnp.asarray(other))
    np.testing.assert_array_equal(first[:, :10], second[:, :10])


@pytest.mark.parametrize("stray", [128, -1])
def test_a_token_outside_the_vocabulary_gives_nan_and_not_another_tokens_logits(stray):
    model = convert(make_reference("llama"))
    assert jnp.isnan(forward(model, jnp.array([[3, stray]], jnp.int32))[:, 1]).all()


TOKENS = [[3, 70, 5]]


@pytest.mark.parametrize(
    "tokens",
    [
        TOKENS,
        (tuple(TOKENS[0]),),
        *(np.array(TOKENS, dtype) for dtype in ("int64", "uint64", "uint8", "int8")),
        *(jnp.array(TOKENS, dtype) for dtype in ("uint32", "int8")),
    ],
)
def test_integers_of_every_kind_are_tokens(tokens):
    model = convert(make_reference("llama"))
    expected = forward(model, jnp.array(TOKENS, jnp.int32))
    np.testing.assert_allclose(model(tokens), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "stray", [2**40, -(2**32), 2**32 + 3, np.uint32(2**32 - 1), np.uint64(2**63), np.int64(128)]
)
def test_a_token_too_wide_for_32_bits_is_not_another_one(stray):
    """-(2**32) and 2**32 + 3 would be the tokens 0 and 3."""
    model = convert(make_reference("llama"))
    kind = stray.dtype if isinstance(stray, np.generic) else np.int64
    kinds = [np.array([[3, stray]], kind)]
    kinds += [jnp.asarray(kinds[0])] if kind == np.uint32 else []
    for tokens in kinds:
        assert jnp.isnan(model(tokens)[:, 1]).all()


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([1, 2], r"got shape \(2,\); one row is \[\[1, 2, 3\]\]"),
        (jnp.ones((1, 2, 3), jnp.int32), r"got shape \(1, 2, 3\)"),
        (jnp.ones((1, 2)), r"got float32 \(1, 2\)"),
        ([[True]], "got bool"),
        ([[1], [2, 3]], r"got \[\[1\], \[2, 3\]\]"),
        (np.zeros((2, 0), np.int32), r"at least one in each row, got shape \(2, 0\)"),
        (jnp.zeros((0, 3), jnp.int32), r"at least one in each row, got shape \(0, 3\)"),
        ([[]], "at least one in each row"),
        ("Hello", "got 'Hello'"),
        (None, "got None"),
    ],
)
def test_what_is_no_batch_of_tokens_is_refused(tokens, reason):
    model = convert(make_reference("llama"))
    with pytest.raises(InputError, match=f"^tokens: expected .*{reason}"):
        model(tokens)


def test_layers_of_one_shape_are_traced_once():
    model = convert(make_reference("llama", num_hidden_layers=3))
    tokens = jnp.zeros((1, 4), jnp.int32)
    jaxpr = jax.make_jaxpr(Llama.__call__)(model, tokens)
    calls = [e for e in jaxpr.eqns if e.params.get("name") == "run_layer"]
    assert len(calls) == 3
    assert len({id(e.params["jaxpr"]) for e in calls}) == 1
