"""Rotary position embeddings, applied (`jaxwna16.models.parts.rope` makes the tables)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the halves of each head of x [B, S, H, D] by angles, whose tables are [B, S, R / 2].

    In the dtype of the tables, to which x is cast. Features past R stay as they are.
    """
    half, wide = cos.shape[-1], x.astype(cos.dtype)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second, rest = jnp.split(wide, [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    turned = jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)
    return turned.astype(x.dtype)
