"""Sampling against NumPy and transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from jaxwna16.generation.sampling import are_sound, filter_logits, sample

VOCAB = 50


def make_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32)


def filtered(logits, top_k=0, top_p=1.0) -> np.ndarray:
    return np.asarray(filter_logits(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p)))


def draw(logits, seed=0, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    options = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    return np.asarray(jitted(jnp.asarray(logits), jax.random.key(seed), *options))


jitted = jax.jit(sample)


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
    np.testing.assert_array_equal(are_sound(jnp.asarray(rows)), expected.numpy())
    drawn = [draw(rows, temperature=temperature) for temperature in (0.0, 1.0)]
    for tokens in drawn:  # never what has the probability 0
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
