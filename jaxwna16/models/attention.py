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
    """Put k, v [B, S, kv_heads, D] into the slots that start at each row's first position."""
    import os
    mode=os.environ.get("WS","unroll")
    def write(slots: jax.Array, new: jax.Array) -> jax.Array:
        new=new.swapaxes(1,2)
        if mode=="unroll":
            for row in range(new.shape[0]):
                slots = lax.dynamic_update_slice(slots, new[row : row + 1], (row, 0, positions[row, 0], 0))
            return slots
        if mode=="fori":
            def body(row, slots):
                return lax.dynamic_update_slice(slots, lax.dynamic_slice_in_dim(new,row,1,0), (row, 0, positions[row, 0], 0))
            return lax.fori_loop(0,new.shape[0],body,slots)
        if mode=="scatter":
            rows=jnp.arange(positions.shape[0])[:, None]
            return slots.at[rows,:,positions].set(new.swapaxes(1,2), unique_indices=True)
        if mode=="vmap":
            return jax.vmap(lambda c,x,p: lax.dynamic_update_slice(c,x,(0,p,0)))(slots,new,positions[:,0])
        if mode=="select":
            at=(jnp.arange(slots.shape[2])[None,:]==positions)[:,None,:,None]
            return jnp.where(at,new,slots)

    return LayerCache(write(cache.k, k), write(cache.v, v))


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
    grouped = q.reshape(batch, steps, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    queries = grouped.reshape(batch, kv_heads, -1, head_dim)
    scores = lax.dot_general(
        queries,
        cache.k,
        (((3,), (3,)), ((0, 1), (0, 1))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scores = scores.reshape(*grouped.shape[:4], -1) * head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None, None, :, :], scores, -jnp.inf), axis=-1)
    weights = weights.astype(q.dtype).reshape(*queries.shape[:3], -1)
    mixed = lax.dot_general(
        weights, cache.v, (((3,), (2,)), ((0, 1), (0, 1))), precision=precision
    ).reshape(grouped.shape)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, steps, heads * head_dim)
