"""Attention over a cache in which every row keeps its own positions.

`attend` is the middle of it, `project_and_attend` all from the layer's input to the mixed values.
On a GPU one new token a row takes three kernels: q, k and v; then the sum of the splits, norms,
rotation, the write into the cache and the seen slots; and what joins the programs of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.formulas.heads import Heads
from pallas_kernels.formulas.norms import Norm, apply_norm
from pallas_kernels.formulas.rotation import Rotation
from pallas_kernels.lowering import choose_at_lowering, has_symbolic, refuse_at_lowering
from pallas_kernels.step.linears import Linear, separate
from pallas_kernels.xla.attention import attend as attend_by_xla
from pallas_kernels.xla.attention import mix, normalise_values

Cache = tuple[jax.Array, jax.Array]

_SYMBOLIC = (
    "a GPU kernel needs known sizes, got queries {q} and keys {k}: export the function once for "
    'each, or for cpu alone, or with backend="xla"'
)


def project_and_attend(
    x: jax.Array,
    linears: Sequence[Linear],
    norms: tuple[Norm | None, Norm | None],
    rotation: Rotation | None,
    start: jax.Array,
    count: jax.Array,
    window: int | None,
    cache: Cache | None,
    *,
    heads: Heads,
    backend: str | None = None,
    prefer: str = "speed",
) -> tuple[jax.Array, Cache | None]:
    """Self-attention of a piece, but for the output product.

    Args:
      x: [B, S, K].
      linears: of q, k and v; of q and k alone, values are the keys before their norm.
      norms: of queries and keys, or None.
      rotation: of the positions; None rotates nothing.
      start, count, window: as in `attend`.
      cache: keys and values [B * kv_heads, C, D] of the tokens before; None for a piece that is
        whole rows.
      heads, backend, prefer: how the layer is divided; and as in `quant_matmul`.

    Returns:
      [B, S, H * D] in the dtype of x, and the cache with the piece's keys and values.

    Raises:
      SpecError, BackendError, TableError: as `quant_matmul`.
    """
    arrays, call = separate(linears, backend, prefer)
    scores: dict[str, Any] = {"scale": heads.scale, "softcap": heads.softcap}
    if cache is None or x.shape[1] > 1 or has_symbolic(x.shape) or 0 in x.shape:
        products = call.multiply(x, arrays)
        run = functools.partial(attend, window=window, backend=backend, **scores)
        return mix(products, norms, rotation, start, count, cache, heads=heads, attend=run)
    x = call.check(x, arrays)

    def by_xla(x, arrays, norms, rotation, start, count, cache):
        products = call.multiply_by_xla(x, arrays)
        run = functools.partial(attend_by_xla, window=window, **scores)
        return mix(products, norms, rotation, start, count, cache, heads=heads, attend=run)

    def by_triton(x, arrays, norms, rotation, start, count, cache, *, interpret):
        # imported here, so that all else works where a later jax has no Pallas-Triton
        from pallas_kernels.triton.parts import Parts, finish
        from pallas_kernels.triton.step.decode_attention import attend_token

        q, k, *rest = call.multiply_in_parts(x, arrays, interpret=interpret)
        v = rest[0] if rest else k
        if heads.value_eps is not None:
            [y] = finish([v], x.dtype)
            y = normalise_values(y.reshape(len(y), -1, heads.head_dim), heads)
            v = Parts(y.reshape(1, len(y), -1))
        if heads.norms_across:
            q, k = (
                y if norm is None else Parts(apply_norm(*finish([y], x.dtype), norm)[None])
                for y, norm in zip((q, k), norms, strict=True)
            )
            norms = None, None
        mixed, *cache = attend_token(
            q,
            k,
            v,
            q_norm=norms[0],
            k_norm=norms[1],
            rotation=jax.tree.map(lambda table: table[:, 0], rotation),
            position=start,
            active=count,
            cache_k=cache[0],
            cache_v=cache[1],
            kv_heads=heads.kv_heads,
            window=window,
            gated=heads.gated,
            paired=heads.paired,
            norms_last=heads.norms_last,
            interpret=interpret,
            **scores,
        )
        return mixed[:, None], tuple(cache)

    run = choose_at_lowering(by_xla, by_triton, backend, x.dtype)
    return run(x, arrays, norms, rotation, start, count, tuple(cache))


def attend(
    q: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    start: jax.Array,
    count: jax.Array,
    window: int | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
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
      scale, softcap: of the scores, see `Heads`.
      backend: as in `quant_matmul`; float32 is always XLA's.

    Returns:
      [B, S, H * D] in the dtype of q.

    Raises:
      BackendError: if sizes are symbolic (in `jax.export`) where a GPU kernel is lowered.
    """
    facts = {"window": window, "scale": scale, "softcap": softcap}
    by_xla = functools.partial(attend_by_xla, **facts)
    # one query fills no tile
    if q.shape[1] == 1:
        return by_xla(q, cache_k, cache_v, start, count)
    by_triton = functools.partial(_attend_by_triton, **facts)
    choose = choose_at_lowering(by_xla, by_triton, backend, q.dtype)
    return choose(q, cache_k, cache_v, start, count)


def _attend_by_triton(q, cache_k, cache_v, start, count, *, interpret, **facts) -> jax.Array:
    # imported here, so that all else works where a later jax has no Pallas-Triton
    from pallas_kernels.triton.step.flash import attend_piece

    if has_symbolic((*q.shape, *cache_k.shape)):
        refused = refuse_at_lowering(_SYMBOLIC.format(q=list(q.shape), k=list(cache_k.shape)))
        batch, steps, heads, head_dim = q.shape
        return jnp.full((batch, steps, heads * head_dim), refused.astype(q.dtype))
    return attend_piece(q, cache_k, cache_v, start=start, count=count, interpret=interpret, **facts)
