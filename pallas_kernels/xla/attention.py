"""The XLA path of attention: two products and a softmax between them, wherever JAX runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formulas.activations import cap, round_sigmoid
from pallas_kernels.formulas.heads import Heads
from pallas_kernels.formulas.norms import Norm, apply_norm, normalise
from pallas_kernels.formulas.rotation import Rotation, rotate

Array = jax.Array
Cache = Pair = tuple[Array, Array]


def mix(
    products: Sequence[Array],
    norms: tuple[Norm | None, Norm | None],
    rotation: Rotation | None,
    start: Array,
    count: Array,
    cache: Cache | None,
    *,
    heads: Heads,
    attend: Callable[..., Array],
) -> tuple[Array, Cache | None]:
    """From q, k and v [B, S, N] to the mixed values [B, S, H * D], and the cache with the piece.

    Args:
      products: without a v, values are the keys before their norm.
      rotation: cosines and sines [B, S, R / 2]; None rotates nothing.
      attend: attention over the cache, or over the piece's own keys and values without one.
    """
    q, k, v = products if len(products) == 3 else (*products, products[1])
    lead = q.shape[:2]
    if heads.norms_across:
        q, k = (
            y if norm is None else apply_norm(y, norm)
            for y, norm in zip((q, k), norms, strict=True)
        )
        norms = None, None
    gate = None
    if heads.gated:
        q, gate = jnp.split(q.reshape(*lead, -1, 2 * heads.head_dim), 2, axis=-1)
    q, k, v = (y.reshape(*lead, -1, heads.head_dim) for y in (q, k, v))
    v = normalise_values(v, heads)
    if heads.norms_last:
        q, k = _normalise(_rotate((q, k), rotation, heads), norms)
    else:
        q, k = _rotate(_normalise((q, k), norms), rotation, heads)
    if rotation is not None and rotation.scale is not None:
        q = q * rotation.scale[:, :, None, None]
    held = _fold_heads(k), _fold_heads(v)
    if cache is not None:
        held = cache = _write_slots(cache, held, _find_slots(start, count, lead[1]))
    mixed = attend(q, *held, start, count)
    if gate is not None:
        mixed = mixed * round_sigmoid(gate).reshape(mixed.shape)
    return mixed, cache


def normalise_values(v: Array, heads: Heads) -> Array:
    """The values [..., D] of single heads, normalised where they are; in their dtype."""
    return v if heads.value_eps is None else normalise(v, heads.value_eps).astype(v.dtype)


def _normalise(pair: Pair, norms: tuple[Norm | None, Norm | None]) -> Pair:
    q, k = (y if norm is None else apply_norm(y, norm) for y, norm in zip(pair, norms, strict=True))
    return q, k


def _rotate(pair: Pair, rotation: Rotation | None, heads: Heads) -> Pair:
    if rotation is None:
        return pair
    q, k = (rotate(y, rotation.cos, rotation.sin, paired=heads.paired) for y in pair)
    return q, k


def _fold_heads(x: Array) -> Array:
    """Keys or values [B, S, kv_heads, D] in the cache's order, [B * kv_heads, S, D]."""
    batch, steps, heads, head_dim = x.shape
    return x.swapaxes(1, 2).reshape(batch * heads, steps, head_dim)


def _find_slots(start: Array, count: Array, steps: int) -> Array:
    """Where the keys of a piece go, int32 [B, S]; padding goes to a slot that no cache has."""
    step = jnp.arange(steps, dtype=jnp.int32)[None, :]
    nowhere = jnp.iinfo(jnp.int32).max
    return jnp.where(step < count[:, None], start[:, None] + step, nowhere)


def _write_slots(cache: Cache, new: Cache, slots: Array) -> Cache:
    """Put folded keys and values of S tokens into `slots`, int32 [B, S], where there are such."""
    lines = cache[0].shape[0]
    slots = jnp.repeat(slots, lines // slots.shape[0], axis=0)
    line = jnp.arange(lines)[:, None]
    keys, values = (
        held.at[line, slots].set(x, mode="drop") for held, x in zip(cache, new, strict=True)
    )
    return keys, values


def attend(
    q: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    start: jax.Array,
    count: jax.Array,
    *,
    window: int | None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """As `pallas_kernels.step.attention.attend`, with float32 scores [B, H, S, C] in memory.

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
    factor = float(head_dim) ** -0.5 if scale is None else scale
    scores = cap(scores.reshape(*grouped.shape[:4], slots) * factor, softcap)
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
