"""Rotary position embeddings, applied (`jaxwna16.models.parts.rope` makes the tables)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """What turns the heads of some tokens, and what queries are then multiplied by.

    Attributes:
      cos, sin: [B, S, R / 2], see `rotate`.
      scale: [B, S] in the dtype of the queries, or None.
    """

    cos: jax.Array
    sin: jax.Array
    scale: jax.Array | None = None


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, paired: bool = False) -> jax.Array:
    """Turn pairs of features of each head of x [B, S, H, D] by angles of tables [B, S, R / 2].

    In the dtype of the tables, to which x is cast. Features past R stay as they are.

    Args:
      paired: whether feature 2i is turned together with feature 2i + 1, and not i with i + R / 2.
    """
    half, wide = cos.shape[-1], x.astype(cos.dtype)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second, rest = jnp.split(wide, [half, 2 * half], axis=-1)
    if paired:
        both = wide[..., : 2 * half]
        first, second = both[..., 0::2], both[..., 1::2]
    turned = [first * cos - second * sin, second * cos + first * sin]
    if paired:
        turned = [jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], 2 * half)]
    turned = jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)
    return turned.astype(x.dtype)
