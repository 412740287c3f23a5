"""Attention of a piece over a cache in one kernel, without scores in memory.

A row of a tile is one query of one of the heads that share a key head, so that keys and values are
read once for all of these heads. A program walks along the slots in blocks and keeps, for each row,
the largest score m so far, the sum l of weights exp(score - m), and the sum of values weighted by
them (https://arxiv.org/abs/2205.14135, https://arxiv.org/abs/2307.08691). Blocks that no query of
the tile sees are never read.

Where all queries of a tile see a block whole, it needs no mask. So the walk has up to three parts:
blocks that windows begin in, whole blocks, and blocks that hold the queries' own slots.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.errors import BackendError
from pallas_kernels.tiles.attention.flash_rules import FlashTiles, choose_flash, pad_head_dim
from pallas_kernels.tiles.device import find_device
from pallas_kernels.triton.step.slots import LOG2_E, finish_scores
from pallas_kernels.triton.walk import divide

_NOTHING = -1e30
"""Stands for the largest of no scores: finite, so that no difference of two is NaN."""

_TYPES = (jnp.bfloat16, jnp.float16)


def attend_piece(
    q: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    *,
    start: jax.Array,
    count: jax.Array,
    window: int | None,
    scale: float | None = None,
    softcap: float | None = None,
    tiles: FlashTiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of the queries of a piece over the slots that each of them sees.

    Query i of row b has position start[b] + i, and sees the slots up to it, with a window only the
    last `window` of them. What is in a slot that no query of a tile sees has no influence, even if
    it is NaN.

    Args:
      q: [B, S, H, D] bfloat16 or float16.
      cache_k, cache_v: [B * kv_heads, C, D] in the dtype of q; position p of a row is in slot p.
        The piece's own keys and values are already there.
      start, count: int32 [B], how many tokens come before the piece, and how many are in it.
        Queries from `count` on give numbers that mean nothing, and are finite.
      window: how many tokens a query sees, itself included; None is all before it.
      scale, softcap: of the scores, see `pallas_kernels.formulas.heads.Heads`.
      tiles: how the work is divided; None is by rule.
      interpret: run as ordinary XLA operations, slowly but on any device, instead of on a GPU.

    Returns:
      [B, S, H * D] in the dtype of q.

    Raises:
      BackendError: if the arrays are not bfloat16 or float16.
    """
    batch, steps, heads, head_dim = q.shape
    lines = cache_k.shape[0]
    if q.dtype not in _TYPES or {cache_k.dtype, cache_v.dtype} != {q.dtype}:
        found = ", ".join(x.dtype.name for x in (q, cache_k, cache_v))
        raise BackendError(f"the Triton kernel takes bfloat16 or float16 alone, got {found}")
    rows = steps * (heads * batch // lines)
    tiles = tiles or choose_flash(rows, head_dim, find_device())
    scale = head_dim**-0.5 if scale is None else scale
    facts = {"tiles": tiles, "window": window, "scale": scale, "softcap": softcap}
    out = pl.pallas_call(
        functools.partial(_attend_tile, plain=interpret, **facts),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(pl.cdiv(rows, tiles.block_m) * lines,),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="attend_piece",
    )(q, cache_k, cache_v, start, count)
    return out.reshape(batch, steps, heads * head_dim)


def _attend_tile(
    q_ref,
    k_ref,
    v_ref,
    start_ref,
    count_ref,
    out_ref,
    *,
    tiles: FlashTiles,
    window,
    scale,
    softcap,
    plain,
) -> None:
    """Compute one tile of rows. The last tiles, which see most, come first."""
    batch, steps, heads, head_dim = q_ref.shape
    lines = k_ref.shape[0]
    group = heads * batch // lines
    rows = steps * group
    from_last, line = divide(pl.program_id(0), lines)
    row, head = divide(line, lines // batch)
    begin = (pl.cdiv(rows, tiles.block_m) - 1 - from_last) * tiles.block_m
    places = begin + jnp.arange(tiles.block_m, dtype=jnp.int32)
    features = jnp.arange(pad_head_dim(head_dim), dtype=jnp.int32)
    is_feature = (features < head_dim)[None, :]
    # rows past the last are zeros
    step, within = divide(places, group)
    at = (row, step[:, None], (head * group + within)[:, None], features[None, :])
    mask = (places < rows)[:, None] & is_feature
    q = plgpu.load(q_ref.at[*at], mask=mask, other=0)

    start, count = start_ref[row], count_ref[row]
    first_step = divide(begin, group)[0]
    final_step = divide(jnp.minimum(begin + tiles.block_m, rows) - 1, group)[0]
    walk = _Walk(
        k_ref,
        v_ref,
        line,
        features,
        q,
        positions=start + step,
        lowest=start + first_step,
        # a tile of padding alone sees nothing, and gives zeros
        end=jnp.where(first_step < count, start + jnp.minimum(final_step + 1, count), 0),
        tiles=tiles,
        window=window,
        scale=scale * LOG2_E,
        softcap=softcap,
        plain=plain,
    )
    sums = walk.see()
    plgpu.store(out_ref.at[*at], sums.astype(out_ref.dtype), mask=mask)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The way of a tile along the slots of its line.

    Attributes:
      positions: int32 [block_m], of the rows.
      lowest: int32, the first row's position, and so the last slot that all rows may see.
      end: int32, past the last slot that any row sees.
      scale: of the scores, as exponents of 2.
      softcap: as in `finish_scores`.
      plain: without inline assembly, which only a GPU runs.
    """

    k_ref: Any
    v_ref: Any
    line: jax.Array
    features: jax.Array
    q: jax.Array
    positions: jax.Array
    lowest: jax.Array
    end: jax.Array
    tiles: FlashTiles
    window: int | None
    scale: float
    softcap: float | None
    plain: bool

    @property
    def unit(self) -> float:
        """Of a difference of two scores, as an exponent of 2: capped scores are such already."""
        return self.scale if self.softcap is None else 1.0

    def see(self) -> jax.Array:
        """The tile's result, float32 [block_m, D]."""
        size = self.tiles.block_n
        block_m, width = self.q.shape
        carry = (
            jnp.full((block_m,), _NOTHING, jnp.float32),
            jnp.zeros((block_m,), jnp.float32),
            jnp.zeros((block_m, width), jnp.float32),
        )
        whole, masked = (functools.partial(self._add, masked) for masked in (False, True))
        stop = _divide_up(self.end, size)
        first, inner = jnp.int32(0), jnp.int32(0)
        if self.window is not None:
            first = divide(jnp.maximum(self.lowest + 1 - self.window, 0), size)[0]
            inner = _divide_up(jnp.maximum(self.end - self.window, 0), size)
            inner = jnp.maximum(jnp.minimum(inner, stop), first)
            carry = _repeat(first, inner, masked, carry)
        outer = divide(jnp.minimum(self.lowest + 1, self.end), size)[0]
        outer = jnp.maximum(outer, inner)
        carry = _repeat(inner, outer, whole, carry)
        _, total, sums = _repeat(outer, stop, masked, carry)
        # where no slot is seen: 0 instead of 0 / 0
        return sums / jnp.where(total == 0, 1.0, total)[:, None]

    def _add(self, masked: bool, block: jax.Array, carry: tuple) -> tuple:
        """Add a block of slots, of which not all are seen by all rows if `masked`."""
        largest, total, sums = carry
        slots = block * self.tiles.block_n + jnp.arange(self.tiles.block_n, dtype=jnp.int32)
        at = (self.line, slots[:, None], self.features[None, :])
        mask = self._find_loaded(slots, masked)
        scores = plgpu.dot(self.q, _load(self.k_ref.at[*at], mask), trans_b=True)
        if self.softcap is not None:
            scores = finish_scores(scores, self.scale, self.softcap)
        if masked:
            seen = self._find_seen(slots[None, :], self.positions[:, None], self.positions[:, None])
            scores = jnp.where(seen, scores, -jnp.inf)
        new = jnp.maximum(largest, jnp.max(scores, axis=1))
        weights = self._raise_two(scores, new[:, None])
        # of the difference: products of what stands for no score would not cancel
        shrink = jnp.exp2((largest - new) * self.unit)
        total = total * shrink + jnp.sum(weights, axis=1)
        v = _load(self.v_ref.at[*at], mask)
        sums = sums * shrink[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return new, total, sums

    def _find_loaded(self, slots: jax.Array, masked: bool) -> jax.Array | None:
        """Which numbers of a block are loaded, or None for all.

        Those of a slot that no row sees are not: they would count as 0 * NaN.
        """
        mask = None
        if masked:
            mask = self._find_seen(slots, self.lowest, self.end - 1)[:, None]
        if self.features.size != self.k_ref.shape[2]:
            is_feature = (self.features < self.k_ref.shape[2])[None, :]
            mask = is_feature if mask is None else mask & is_feature
        return mask

    def _find_seen(self, slots: jax.Array, lowest: jax.Array, highest: jax.Array) -> jax.Array:
        """Which slots are seen from any of the positions `lowest` to `highest`."""
        seen = slots <= highest
        return seen if self.window is None else seen & (slots > lowest - self.window)

    def _raise_two(self, scores: jax.Array, largest: jax.Array) -> jax.Array:
        """2^(unit (scores - largest)), in two instructions; what is below 2^-126 may be 0."""
        offset = jnp.broadcast_to(largest * -self.unit, scores.shape)
        if self.plain:
            return jnp.exp2(scores * self.unit + offset)
        scale = jnp.full_like(offset, self.unit)
        [raised] = plgpu.elementwise_inline_asm(
            "{ .reg .f32 t; fma.rn.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }",
            args=[scores, scale, offset],
            constraints="=f,f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, scores.dtype)],
        )
        return raised


def _repeat(first: jax.Array, stop: jax.Array, body: Callable, carry: tuple) -> tuple:
    """A loop that is not entered for nothing.

    What Triton hoists out of it would run: on Blackwell, reads of scores that nobody wrote.
    """
    return lax.cond(first < stop, lambda: lax.fori_loop(first, stop, body, carry), lambda: carry)


def _load(at: Any, mask: jax.Array | None) -> jax.Array:
    return plgpu.load(at) if mask is None else plgpu.load(at, mask=mask, other=0)


def _divide_up(number: jax.Array, by: int) -> jax.Array:
    return divide(number + (by - 1), by)[0]
