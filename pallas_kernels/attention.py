"""`attend`: attention over a cache in which every row keeps its own positions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.lowering import choose_at_lowering, has_symbolic, refuse_at_lowering
from pallas_kernels.xla.attention import attend as attend_by_xla

_SYMBOLIC = (
    "a GPU kernel needs known sizes, got queries {q} and keys {k}: export the function once for "
    'each, or for cpu alone, or with backend="xla"'
)


def attend(
    q: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    start: jax.Array,
    count: jax.Array,
    window: int | None,
    *,
    backend: str | None = None,
) -> jax.Array:
    """Causal attention of the queries of a piece, softmax in float32.

    Query i of row b has position start[b] + i. It sees the slots up to its position, with a window
    only the last `window` of them. On a GPU, 16-bit queries of more than one token run in one
    kernel, without scores in memory. Derivatives are those of the XLA form.

    Args:
      q: [B, S, H, D].
      cache_k, cache_v: [B * kv_heads, C, D]; position p of a row is in slot p, and the piece's own
        keys and values are already there. Without a cache they are the piece's own, and start is 0.
      start, count: int32 [B], how many tokens come before the piece, and how many are in it.
        Results of queries from `count` on mean nothing, but are finite.
      window: how many tokens a query sees, itself included; None is all before it.
      backend: as in `quant_matmul`; float32 is always XLA's.

    Returns:
      [B, S, H * D] in the dtype of q.

    Raises:
      BackendError: if sizes are symbolic (in `jax.export`) where a GPU kernel is lowered.
    """
    by_xla = functools.partial(attend_by_xla, window=window)
    if q.shape[1] == 1:  # one query fills no tile
        return by_xla(q, cache_k, cache_v, start, count)
    by_triton = functools.partial(_attend_by_triton, window=window)
    choose = choose_at_lowering(by_xla, by_triton, backend, q.dtype)
    return choose(q, cache_k, cache_v, start, count)


def _attend_by_triton(q, cache_k, cache_v, start, count, *, window, interpret) -> jax.Array:
    # imported here, so that all else works where a later jax has no Pallas-Triton
    from pallas_kernels.triton.flash import attend_piece

    if has_symbolic((*q.shape, *cache_k.shape)):
        refused = refuse_at_lowering(_SYMBOLIC.format(q=list(q.shape), k=list(cache_k.shape)))
        batch, steps, heads, head_dim = q.shape
        return jnp.full((batch, steps, heads * head_dim), refused.astype(q.dtype))
    return attend_piece(
        q, cache_k, cache_v, start=start, count=count, window=window, interpret=interpret
    )
