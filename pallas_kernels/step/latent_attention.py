"""Multi-head latent attention (https://arxiv.org/abs/2405.04434); no kernel, XLA's products.

Of a token the cache keeps a latent c and a rotated key r that all heads share. With W_k and W_v of
a head, that head's key is [W_k c, r], and its value W_v c:

    scores  q . W_k c + q_r . r  =  (W_k^T q) . c + q_r . r
    values  sum_j p_j W_v c_j    =  W_v (sum_j p_j c_j)

One token takes the right sides: its query goes into the latents' space and the sum comes back, so
that the cache is read as it is. A piece takes the left sides, which cost less for each query. It
walks through the slots in blocks, expands one block at a time, and joins their sums by their
largest scores (https://arxiv.org/abs/2112.05682), so that neither keys nor scores of all slots are
in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lowering import has_symbolic

Array = jax.Array
Pair = tuple[Array, Array]

BLOCK = 512
"""Slots that a piece expands at a time."""


def write_latents(cache: Pair, new: Pair, start: Array, count: Array) -> Pair:
    """Put what is kept of a piece into the slots of its positions.

    Args:
      cache: latents [B, C, R] and keys [B, C, P].
      new: those of the piece, [B, S, R] and [B, S, P].
      start, count: int32 [B], how many tokens come before the piece, and how many are in it; what
        is past them is not written.
    """
    batch, steps = new[0].shape[:2]
    step = jnp.arange(steps, dtype=jnp.int32)[None, :]
    nowhere = jnp.iinfo(jnp.int32).max
    slots = jnp.where(step < count[:, None], start[:, None] + step, nowhere)
    row = jnp.arange(batch)[:, None]
    latents, keys = (
        held.at[row, slots].set(x, mode="drop") for held, x in zip(cache, new, strict=True)
    )
    return latents, keys


def attend_latents(
    q: Array,
    q_rotated: Array,
    held: Pair,
    weights: Pair,
    start: Array,
    count: Array,
    *,
    scale: float,
    is_whole: bool,
) -> Array:
    """Causal attention of the queries of a piece, softmax in float32.

    Args:
      q, q_rotated: [B, S, H, D] and [B, S, H, P].
      held: latents [B, C, R] and rotated keys [B, C, P]; position p of a row is in slot p, and the
        piece's own are already there.
      weights: W_k [H * D, R] and W_v [H * V, R].
      start, count: int32 [B], how many tokens come before the piece, and how many are in it.
        Results of queries from `count` on mean nothing, but are finite.
      scale: of the scores.
      is_whole: whether the slots are the piece's own tokens, and not those of a cache.

    Returns:
      [B, S, H * V] in the dtype of q.
    """
    batch, steps, heads, _ = q.shape
    rank = held[0].shape[-1]
    w_k, w_v = (w.reshape(heads, -1, rank) for w in weights)
    step = jnp.arange(steps, dtype=jnp.int32)[None, :]
    positions = start[:, None] + jnp.minimum(step, jnp.maximum(count - 1, 0)[:, None])
    if not has_symbolic(q.shape) and steps == 1:
        mixed = _attend_absorbed(q, q_rotated, held, w_k, w_v, positions, scale)
    else:
        mixed = _attend_expanded(q, q_rotated, held, w_k, w_v, positions, scale, is_whole)
    return mixed.astype(q.dtype).reshape(batch, steps, -1)


def _attend_absorbed(q, q_rotated, held, w_k, w_v, positions, scale) -> Array:
    latents, keys = held
    multiply = _choose_product(q.dtype)
    inner = multiply("bshd,hdr->bshr", q, w_k).astype(q.dtype)
    scores = multiply("bshr,bcr->bhsc", inner, latents)
    scores = (scores + multiply("bshp,bcp->bhsc", q_rotated, keys)) * scale
    slot = jnp.arange(latents.shape[1])[None, None, :]
    seen = (slot <= positions[:, :, None])[:, None]
    shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(q.dtype)
    mixed = multiply("bhsc,bcr->bshr", shares, latents).astype(q.dtype)
    return multiply("bshr,hvr->bshv", mixed, w_v)


def _attend_expanded(q, q_rotated, held, w_k, w_v, positions, scale, is_whole) -> Array:
    latents, keys = held
    slots = latents.shape[1]
    block = slots if has_symbolic(latents.shape) else min(BLOCK, slots)
    multiply = _choose_product(q.dtype)
    lead = (q.shape[0], q.shape[2], q.shape[1])  # B, H, S

    def add_block(i, sums):
        total, most, mixed = sums
        first = i * block
        # the last block begins earlier where it would end past the slots
        begin = jnp.minimum(first, slots - block)
        c, r = (lax.dynamic_slice_in_dim(x, begin, block, axis=1) for x in (latents, keys))
        expanded = multiply("bcr,hdr->bchd", c, w_k).astype(q.dtype)
        values = multiply("bcr,hvr->bchv", c, w_v).astype(q.dtype)
        scores = multiply("bshd,bchd->bhsc", q, expanded)
        scores = (scores + multiply("bshp,bcp->bhsc", q_rotated, r)) * scale
        slot = begin + jnp.arange(block)[None, None, :]
        seen = (slot >= first) & (slot <= positions[:, :, None])
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        higher = jnp.maximum(most, scores.max(-1))
        shares, kept = jnp.exp(scores - higher[..., None]), jnp.exp(most - higher)
        added = multiply("bhsc,bchv->bhsv", shares.astype(q.dtype), values)
        return total * kept + shares.sum(-1), higher, mixed * kept[..., None] + added

    # finite, since of a block that a query does not see the difference would be NaN
    least = jnp.full(lead, jnp.finfo(jnp.float32).min)
    sums = jnp.zeros(lead, jnp.float32), least, jnp.zeros((*lead, w_v.shape[1]), jnp.float32)
    if has_symbolic(latents.shape) or slots <= block:
        sums = add_block(0, sums)
    else:
        blocks = -(-slots // block)
        # of a cache, only the blocks that hold something; of whole rows all, which has derivatives
        used = blocks if is_whole else jnp.max(positions) // block + 1
        sums = lax.fori_loop(0, used, add_block, sums)
    total, _, mixed = sums
    return (mixed / total[..., None]).swapaxes(1, 2)


def _choose_product(dtype: jax.typing.DTypeLike) -> Callable[[str, Array, Array], Array]:
    """`jnp.einsum` with float32 sums; full float32 products of float32."""
    if dtype == jnp.float32:
        return functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    narrow = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def wide(equation: str, x: Array, y: Array) -> Array:
        # a CPU's XLA has no such product of 16 bits for some orders of axes ("DotThunk")
        return jnp.einsum(equation, x.astype(jnp.float32), y.astype(jnp.float32))

    def multiply(equation: str, x: Array, y: Array) -> Array:
        forms = (functools.partial(form, equation) for form in (wide, narrow))
        return lax.platform_dependent(x, y, cpu=next(forms), default=next(forms))

    return multiply
