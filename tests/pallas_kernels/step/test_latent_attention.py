"""Latent attention by XLA: what it gives is attention over the keys and values of each head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.step import latent_attention
from pallas_kernels.step.latent_attention import attend_latents, write_latents

HEADS, NOPE, ROTATED, VALUE, RANK, SLOTS = 3, 8, 4, 6, 10, 12


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def draw_all(steps: int):
    """Queries of a piece, what is held of three rows, and the weights."""
    return (
        draw(3, steps, HEADS, NOPE, seed=1),
        draw(3, steps, HEADS, ROTATED, seed=2),
        (draw(3, SLOTS, RANK, seed=3), draw(3, SLOTS, ROTATED, seed=4)),
        (draw(HEADS * NOPE, RANK, seed=5), draw(HEADS * VALUE, RANK, seed=6)),
    )


def attend_plainly(q, q_rotated, held, weights, start, count, scale) -> np.ndarray:
    """The formulas with keys and values of all heads in memory, in float64."""
    q, q_rotated, (c, r), (w_k, w_v) = jax.tree.map(
        lambda x: np.asarray(x, np.float64), (q, q_rotated, held, weights)
    )
    keys = np.einsum("bcr,hdr->bchd", c, w_k.reshape(HEADS, NOPE, RANK))
    values = np.einsum("bcr,hvr->bchv", c, w_v.reshape(HEADS, VALUE, RANK))
    scores = np.einsum("bshd,bchd->bhsc", q, keys) + np.einsum("bshp,bcp->bhsc", q_rotated, r)
    last = np.maximum(np.asarray(count) - 1, 0)[:, None]
    positions = np.asarray(start)[:, None] + np.minimum(np.arange(q.shape[1])[None], last)
    seen = np.arange(c.shape[1])[None, None] <= positions[:, :, None]
    scores = np.where(seen[:, None], scores * scale, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bhsc,bchv->bshv", shares / shares.sum(-1, keepdims=True), values)
    return mixed.reshape(*q.shape[:2], -1)


@pytest.mark.parametrize("block", [512, 5, 4])
@pytest.mark.parametrize("steps", [1, 4])
def test_it_is_attention_over_the_keys_and_values_of_each_head(monkeypatch, steps, block):
    """A row ends within the piece, one has no tokens; the last block may overlap the one before."""
    monkeypatch.setattr(latent_attention, "BLOCK", block)
    start, count = jnp.array([0, 3, 8 if steps > 1 else 11]), jnp.array([steps, 0, min(steps, 3)])
    arrays = draw_all(steps)
    run = jax.jit(attend_latents, static_argnames=("scale", "is_whole"))
    found = run(*arrays, start, count, scale=0.7, is_whole=False)
    expected = attend_plainly(*arrays, start, count, 0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_in_bfloat16_sums_are_float32(steps):
    """Where a CPU has no products of 16 bits with such sums, too."""
    arrays = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draw_all(steps))
    start, count = jnp.array([0, 3, 8]), jnp.full(3, steps)
    run = jax.jit(attend_latents, static_argnames=("scale", "is_whole"))
    found = run(*arrays, start, count, scale=0.1, is_whole=False)
    assert found.dtype == jnp.bfloat16
    expected = attend_plainly(*arrays, start, count, 0.1)
    error = np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()
    assert error < 4 * 2.0**-8  # of a query or key, of shares, of their sum, and of the result


def test_slots_past_those_that_are_seen_count_for_nothing(monkeypatch):
    monkeypatch.setattr(latent_attention, "BLOCK", 4)
    start, count = jnp.array([0, 1, 2]), jnp.array([4, 4, 4])
    q, q_rotated, held, weights = draw_all(4)
    past = jnp.arange(SLOTS)[None, :, None] > 5
    options = {"scale": 0.7, "is_whole": False}
    other = (jnp.where(past, 1e4, held[0]), jnp.where(past, -1e4, held[1]))
    found, changed = (
        attend_latents(q, q_rotated, h, weights, start, count, **options) for h in (held, other)
    )
    np.testing.assert_array_equal(found, changed)


def test_whole_rows_in_several_blocks_have_derivatives(monkeypatch):
    monkeypatch.setattr(latent_attention, "BLOCK", 5)
    start, count = jnp.zeros(3, jnp.int32), jnp.full(3, SLOTS)
    q, q_rotated, held, weights = draw_all(SLOTS)

    def add_up(q, block):
        monkeypatch.setattr(latent_attention, "BLOCK", block)
        options = {"scale": 0.7, "is_whole": True}
        return (attend_latents(q, q_rotated, held, weights, start, count, **options) ** 2).sum()

    blocks, at_once = (jax.grad(add_up)(q, block) for block in (5, 512))
    np.testing.assert_allclose(blocks, at_once, rtol=1e-3, atol=1e-5)


def test_tokens_past_the_count_are_not_written():
    empty = jnp.zeros((2, 4, 3)), jnp.zeros((2, 4, 2))
    new = jnp.ones((2, 2, 3)), jnp.ones((2, 2, 2))
    latents, keys = write_latents(empty, new, jnp.array([1, 3]), jnp.array([2, 0]))
    expected = np.zeros((2, 4))
    expected[0, 1:3] = 1
    for held in (latents, keys):
        np.testing.assert_array_equal(held, np.repeat(expected[..., None], held.shape[-1], -1))
