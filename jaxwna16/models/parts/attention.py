"""The preallocated cache of attention, in which every row keeps its own positions."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [B * kv_heads, C, D]; position p of a row is in slot p.

    Row and head are one axis because both products want that shape: with two axes, XLA on CPU
    copied the whole cache in every decoding step of a batch of one.

    Slots past a row's last token hold zeros, or what a longer row left there. They are never seen:
    a query at position p reads slots 0 .. p only, and slot p is written before it is read.
    """

    k: jax.Array
    v: jax.Array

    @property
    def slots(self) -> int:
        """C, how many tokens of a row there is room for."""
        return self.k.shape[1]


class Places(NamedTuple):
    """Where the tokens of a piece belong; see `place_tokens`."""

    positions: jax.Array
    slots: jax.Array


def make_layer_cache(
    batch: int, slots: int, kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> LayerCache:
    """An empty cache: zeros, with room for `slots` tokens of each row."""
    shape = (batch * kv_heads, slots, head_dim)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def place_tokens(start: jax.Array, count: jax.Array, steps: int) -> Places:
    """Find positions and slots, int32 [B, S] each, of S tokens of which the first `count` are real.

    Padding behind them takes the position of the last one, so that it computes with ordinary
    numbers, and a slot that no cache has.

    Args:
      start, count: int32 [B], how many tokens come before the piece, and how many are in it.
      steps: S.
    """
    step = jnp.arange(steps, dtype=jnp.int32)[None, :]
    last = jnp.maximum(count - 1, 0)[:, None]
    positions = start[:, None] + jnp.minimum(step, last)
    nowhere = jnp.iinfo(jnp.int32).max
    return Places(positions, jnp.where(step < count[:, None], positions, nowhere))


def matmul_precision(dtype: jax.typing.DTypeLike) -> lax.Precision:
    """HIGHEST for float32 (an accelerator would otherwise round its inputs), else the default."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def fold_heads(x: jax.Array) -> jax.Array:
    """Keys or values [B, S, kv_heads, D] in the cache's order, [B * kv_heads, S, D]."""
    batch, steps, heads, head_dim = x.shape
    return x.swapaxes(1, 2).reshape(batch * heads, steps, head_dim)


def write_slots(cache: LayerCache, new: LayerCache, slots: jax.Array) -> LayerCache:
    """Put folded keys and values of S tokens into `slots`, int32 [B, S], where there are such."""
    lines = cache.k.shape[0]
    slots = jnp.repeat(slots, lines // slots.shape[0], axis=0)
    line = jnp.arange(lines)[:, None]
    return LayerCache(
        cache.k.at[line, slots].set(new.k, mode="drop"),
        cache.v.at[line, slots].set(new.v, mode="drop"),
    )
