"""Causal attention over a preallocated cache in which every row keeps its own positions."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [B, kv_heads, C, head_dim]; the token at position p is in slot p.

    Slots past a row's last token hold leftovers of padding. They are never seen: a query at position p
    reads slots 0 .. p only, and slot p is written before it is read.
    """

    k: jax.Array
    v: jax.Array


Cache = tuple[LayerCache, ...]
"""One `LayerCache` per layer."""


def matmul_precision(dtype: jax.typing.DTypeLike) -> lax.Precision:
    """HIGHEST for float32 (an accelerator would otherwise round its inputs), else the default."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def write_slots(cache: LayerCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> LayerCache:
    """Put k, v [B, S, kv_heads, D] into the slots given by positions int32 [B, S]."""
    rows = jnp.arange(positions.shape[0])[:, None]
    return LayerCache(cache.k.at[rows, :, positions].set(k), cache.v.at[rows, :, positions].set(v))


def see_slots(positions: jax.Array, slots: int, window: int | None) -> jax.Array:
    """Which slots each query sees, bool [B, S, C]: slot <= position, and > position - window."""
    slot = jnp.arange(slots)[None, None, :]
    position = positions[:, :, None]
    seen = slot <= position
    return seen if window is None else seen & (slot > position - window)


def attend(q: jax.Array, cache: LayerCache, seen: jax.Array) -> jax.Array:
    """Attention of q [B, S, H, D] over the cache, softmax in float32; returns [B, S, H * D].

    The H / kv_heads query heads that share a key head are rows of one product, so keys and values
    are not repeated in memory.
    """
    batch, steps, heads, head_dim = q.shape
    kv_heads = cache.k.shape[1]
    precision = matmul_precision(q.dtype)
    grouped = q.reshape(batch, steps, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum(
        "bskgd,bkcd->bkgsc",
        grouped,
        cache.k,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scores = jnp.where(seen[:, None, None, :, :], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    mixed = jnp.einsum("bkgsc,bkcd->bskgd", weights, cache.v, precision=precision)
    return mixed.reshape(batch, steps, heads * head_dim)
