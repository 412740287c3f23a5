"""Choosing the next token from logits: greedy, temperature, top-k, top-p."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def sample(logits: Array, key: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """Draw one token per row.

    The options are arrays of rank 0, so that other values do not trace anew; only the branch that
    they ask for runs (sorting a vocabulary costs more than a small layer). The filters come in the
    order of transformers: temperature, top-k, top-p.

    Args:
      logits: float32 [B, V].
      key: a typed key. Row r draws with `fold_in(key, r)`, whatever the number of rows.
      temperature: float32; 0 is greedy, where equal logits give the smallest token.
      top_k: int32, draw among the k largest logits (and any equal to the k-th); 0 is off.
      top_p: float32, draw among the fewest tokens whose probabilities reach p; 1 is off.

    Returns:
      Tokens, int32 [B]. Those of rows that are no distribution (`are_sound`) mean nothing.
    """
    filtered = (top_k > 0) | (top_p < 1)

    def draw() -> Array:
        cooled = _cool(logits, temperature)
        keep = lambda: filter_logits(cooled, top_k, top_p)  # noqa: E731
        return _draw(lax.cond(filtered, keep, lambda: cooled), key)

    pick = lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32)  # noqa: E731
    return lax.cond(temperature > 0, draw, pick)


def are_sound(logits: Array) -> Array:
    """Whether each row of logits [B, V] is a distribution; bool [B].

    It is not if a logit is NaN or +inf, or if all are -inf. Some may be -inf: such tokens have the
    probability 0.
    """
    # comparisons, and not a maximum: they are False for NaN on every platform
    return (logits < jnp.inf).all(axis=-1) & (logits > -jnp.inf).any(axis=-1)


def filter_logits(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Set the logits that top-k and top-p leave out to -inf; shapes and options as in `sample`."""
    vocab = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    kth = lax.dynamic_slice_in_dim(ordered, vocab - k, 1, axis=-1)
    ordered = jnp.where(ordered >= kth, ordered, -jnp.inf)
    # Summed from the least likely, where float32 is fine: what sums to 1 - p or less is left out.
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    nucleus = (mass > 1 - top_p) | (top_p >= 1)
    smallest = jnp.min(jnp.where(nucleus, ordered, jnp.inf), axis=-1, keepdims=True)
    smallest = jnp.minimum(smallest, ordered[:, -1:])  # the likeliest stays even if p rounds to 0
    return jnp.where(logits >= jnp.maximum(smallest, kth), logits, -jnp.inf)


def _cool(logits: Array, temperature: Array) -> Array:
    """Logits over the temperature, the largest at 0: a small temperature makes none infinite."""
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature


def _draw(logits: Array, key: Array) -> Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
