"""The XLA path of attention: two products and a softmax between them, wherever JAX runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def attend(
    q: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    start: jax.Array,
    count: jax.Array,
    *,
    window: int | None,
    scale: float | None = None,
) -> jax.Array:
    """As `pallas_kernels.attention.attend`, with float32 scores [B, H, S, C] in memory.

    The query heads that share a key head are rows of one product, so keys and values are not
    repeated in memory. What is in a slot that is not seen must be finite.
    """
    batch, steps, heads, head_dim = q.shape
    lines, slots = cache_k.shape[:2]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    grouped = q.reshape(batch, steps, lines // batch, -1, head_dim).transpose(0, 2, 3, 1, 4)
    scores = lax.dot_general(
        grouped.reshape(lines, -1, head_dim),
        cache_k,
        (((2,), (2,)), ((0,), (0,))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scale = head_dim**-0.5 if scale is None else scale
    scores = scores.reshape(*grouped.shape[:4], slots) * scale
    seen = _see_slots(start, count, steps, slots, window)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None, :, :], scores, -jnp.inf), axis=-1)
    mixed = lax.dot_general(
        weights.astype(q.dtype).reshape(lines, -1, slots),
        cache_v,
        (((2,), (1,)), ((0,), (0,))),
        precision=precision,
    )
    mixed = mixed.reshape(grouped.shape).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, steps, heads * head_dim)


def _see_slots(
    start: jax.Array, count: jax.Array, steps: int, slots: int, window: int | None
) -> jax.Array:
    """Which slots each query sees, bool [B, S, C]: slot <= position, and > position - window."""
    step = jnp.arange(steps, dtype=jnp.int32)[None, :]
    positions = start[:, None] + jnp.minimum(step, jnp.maximum(count - 1, 0)[:, None])
    slot, position = jnp.arange(slots)[None, None, :], positions[:, :, None]
    seen = slot <= position
    return seen if window is None else seen & (slot > position - window)
