"""Sampling against NumPy and transformers."""

from __future__ import annotations

from fractions import Fraction

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from jaxwna16.generation.sampling import _weigh, filter_logits, sample

VOCAB, TOKENS = 50, 360


def make_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32)


def filtered(logits, top_k=0, top_p=1.0) -> np.ndarray:
    return np.asarray(jitted_filter(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p)))


def draw(logits, seed=0, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    options = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    return np.asarray(jitted(jnp.asarray(logits), jax.random.key(seed), *options)[0])


jitted, jitted_filter = jax.jit(sample), jax.jit(filter_logits)


@pytest.mark.parametrize("top_k", [0, 1, 3, 49, 50, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_filters_keep_what_transformers_keeps(top_k, top_p):
    logits = make_logits(8)
    expected = torch.from_numpy(logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    np.testing.assert_array_equal(filtered(logits, top_k, top_p), expected.numpy())


def test_the_nucleus_is_the_smallest_set_that_reaches_p():
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32))
    kept = [int(np.isfinite(filtered(logits, 0, p)).sum()) for p in (0.4, 0.5, 0.6, 0.74, 0.76)]
    assert kept[:1] + kept[2:] == [1, 2, 2, 4]  # equal probabilities stay together
    assert kept[1] in (1, 2)  # 0.5 may be rounded to either side


def test_logits_equal_to_the_kth_are_kept():
    logits = np.array([[1.0, 2.0, 2.0, 0.0]], np.float32)
    assert np.isfinite(filtered(logits, top_k=1)).tolist() == [[False, True, True, False]]


def keep(logits: np.ndarray, top_k: int, top_p: float) -> tuple[np.ndarray, bool]:
    """What is kept of a row, by its definition in float64, and whether rounding may change it.

    What is left out has a relative error: of the weights (exponentials in float32, 2^-22), of the
    whole (as much), of its product with 1 - p (2^-23). What the integers lose is less than 2^-56
    of the whole, for four tokens. So a mass further from 1 - p than 2^-20 of that is sure.
    """
    kept = logits >= np.sort(logits)[::-1][min(top_k or len(logits), len(logits)) - 1]
    if top_p == 1:
        return kept, False
    weights = np.exp(logits.astype(np.float64) - logits.max()) * kept
    mass = np.array([weights[logits <= x].sum() for x in logits]) / weights.sum()
    bound, likeliest = 1 - float(np.float32(top_p)), logits == logits.max()
    doubt = np.abs(mass - bound) < bound * 2.0**-20 + 2.0**-56
    return kept & ((mass > bound) | likeliest), bool((doubt & ~likeliest).any())


LEVELS = np.array([-np.inf, -200.0, -1.5, -0.0, 0.0, 0.75], np.float32)
"""Numbers of a small vocabulary; of the two zeros neither is larger."""


@pytest.mark.parametrize("top_k", [0, 1, 2, 4, 9])
@pytest.mark.parametrize("top_p", [1e-30, 0.07, 0.31, 0.55, 0.8, 0.93, 1 - 2**-24, 1.0])
def test_of_all_small_vocabularies_what_is_defined_is_kept(top_k, top_p):
    """All rows of four out of six numbers, so with all ties, at bounds between their masses."""
    rows = np.stack(np.meshgrid(*[LEVELS] * 4), axis=-1).reshape(-1, 4)
    rows = rows[(rows > -np.inf).any(axis=1)]
    found = np.isfinite(filtered(rows, top_k, top_p))
    expected, doubts = zip(*(keep(row, top_k, top_p) for row in rows), strict=True)
    sure = ~np.array(doubts)
    assert sure.mean() > 0.95
    # what is kept and has -inf cannot be seen
    expected = np.array(expected) & np.isfinite(rows)
    np.testing.assert_array_equal(found[sure], expected[sure])


@hypothesis.given(
    values=st.lists(st.floats(-40, 0, width=32, allow_subnormal=False), min_size=1, max_size=12),
    share=st.integers(0, TOKENS),
    seed=st.integers(0, 2**32 - 1),
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_sums_are_exact_whatever_their_order(values, share, seed):
    """The integers are those of the rational sum, but for less than the last bit of each weight."""
    numbers = np.random.default_rng(seed)
    weights = np.exp(np.float32(values) - max(np.float32(values)))
    weights = numbers.permutation(np.resize(weights, TOKENS))
    chosen, order = np.arange(TOKENS) < share, numbers.permutation(TOKENS)
    bits = 32 - TOKENS.bit_length()

    def add(weights: np.ndarray, chosen: np.ndarray) -> Fraction:
        high, low = weigh(jnp.asarray(weights[None]), jnp.asarray(chosen[None, None]))
        return int(high[0, 0]) + Fraction(int(low[0, 0]), 2**bits)

    found, whole = add(weights, chosen), add(weights, np.full(TOKENS, True))
    assert add(weights[order], chosen[order]) == found
    assert 2**29 <= whole < 2**31
    exact, total = (sum(map(Fraction, x.tolist()), Fraction()) for x in (weights[chosen], weights))
    assert abs(found / whole - exact / total) < TOKENS * Fraction(2, 2 ** (30 + bits))


weigh = jax.jit(lambda weights, chosen: _weigh(weights)(chosen))


@pytest.mark.parametrize(("top_k", "top_p"), [(50, 1.0), (0, 0.9), (1000, 0.99), (0, 1 - 2e-7)])
def test_a_large_vocabulary_is_filtered_as_if_it_were_sorted(top_k, top_p):
    """With the numbers of a head in bfloat16, most of which are there many times."""
    numbers = np.random.default_rng(4).normal(0, 4, 151_936).astype(jnp.bfloat16)
    logits = numbers.astype(np.float32)
    values, counts = np.unique(logits, return_counts=True)
    assert len(values) < 20_000
    at_least = np.cumsum(counts[::-1])[::-1]
    kth = values[at_least >= (top_k or len(logits))].max()
    weights = np.where(values >= kth, counts * np.exp(values.astype(np.float64) - values[-1]), 0)
    mass = np.cumsum(weights) / weights.sum()
    bound = 1 - float(np.float32(top_p))
    assert top_p == 1 or np.abs(mass - bound).min() > 2**-40 + bound * 2**-20
    smallest = values[mass > bound].min() if top_p < 1 else kth
    found = np.isfinite(filtered(logits[None], top_k, top_p))[0]
    np.testing.assert_array_equal(found, logits >= smallest)


def test_digits_of_four_bits_find_what_single_bits_find(monkeypatch):
    """As on a GPU, by its branch."""
    rows = np.concatenate([make_logits(30), np.float32(np.round(make_logits(30, seed=1)))])
    branch = lambda *args, cpu, default: default(*args)  # noqa: E731
    for top_k, top_p in [(3, 1.0), (0, 0.7), (20, 0.95)]:
        expected = filtered(rows, top_k, top_p)
        with monkeypatch.context() as patch:
            patch.setattr("jax.lax.platform_dependent", branch)
            options = jnp.int32(top_k), jnp.float32(top_p)
            found = jax.jit(lambda *args: filter_logits(*args))(jnp.asarray(rows), *options)
        np.testing.assert_array_equal(found, expected)


def test_temperature_zero_takes_the_largest_and_the_first_of_equals():
    logits = make_logits(4)
    logits[2, [7, 9]] = 100
    np.testing.assert_array_equal(draw(logits, temperature=0.0), logits.argmax(axis=1))


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-37, 1e-5])
@pytest.mark.parametrize("top_k", [0, 2])
def test_the_smallest_temperatures_are_greedy(temperature, top_k):
    """The largest two of these rows differ by 0.01 and more, which is 1000 at 1e-5."""
    logits = make_logits(8)
    assert (np.diff(np.sort(logits, axis=1)[:, -2:]) > 0.01).all()
    np.testing.assert_array_equal(
        draw(logits, temperature=temperature, top_k=top_k), logits.argmax(axis=1)
    )


def test_rows_of_which_torch_makes_probabilities_are_the_sound_ones():
    kinds = np.array([0.0, -np.inf, np.inf, np.nan, 3e38], np.float32)
    rows = np.stack(np.meshgrid(kinds, kinds, kinds), axis=-1).reshape(-1, 3)
    expected = torch.softmax(torch.from_numpy(rows), dim=-1).isfinite().all(dim=-1)
    for temperature in (0.0, 1.0):
        options = jnp.float32(temperature), jnp.int32(0), jnp.float32(1)
        tokens, sound = jitted(jnp.asarray(rows), jax.random.key(0), *options)
        np.testing.assert_array_equal(sound, expected.numpy())
        # never what has the probability 0
        tokens = np.asarray(tokens)
        chosen = np.take_along_axis(rows, tokens[:, None], axis=1)[:, 0]
        assert np.isfinite(chosen[expected]).all()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.5, 5, 0.9)])
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    logits, rows = make_logits(1), 40_000
    scaled = filtered(logits / np.float32(temperature), top_k, top_p)[0].astype(np.float64)
    expected = np.exp(scaled - scaled.max())
    expected /= expected.sum()
    drawn = draw(np.repeat(logits, rows, axis=0), 1, temperature, top_k, top_p)
    frequencies = np.bincount(drawn, minlength=VOCAB) / rows
    deviation = np.sqrt(expected * (1 - expected) / rows)
    assert (np.abs(frequencies - expected) <= 5 * deviation + 1e-12).all()


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_rows_draw_does_not_depend_on_the_other_rows(top_p):
    logits = make_logits(64)
    together = draw(logits, seed=3, top_p=top_p)
    np.testing.assert_array_equal(draw(logits[:5], seed=3, top_p=top_p), together[:5])
    assert len(set(draw(np.repeat(logits[:1], 64, axis=0), seed=3).tolist())) > 1


def test_other_options_do_not_trace_anew():
    logits = make_logits(3, seed=9)
    draw(logits)
    traces = jitted._cache_size()
    for temperature, top_k, top_p in [(0.0, 0, 1.0), (0.5, 4, 1.0), (2.0, 0, 0.4)]:
        draw(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assert jitted._cache_size() == traces
