"""The sums of the splits of decode attention, joined: the result of each head, gated if it is."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tiles.attention.decode_rules import find_seen, find_span, pad
from pallas_kernels.triton.parts import Parts, load_sum
from pallas_kernels.triton.step.slots import Sums
from pallas_kernels.triton.walk import divide

_MOST_FEATURES = 128
"""Of one program."""


class Partials(NamedTuple):
    """`Sums` of each head and split, float32. Those of splits that have no work are undefined.

    Attributes:
      mixed: [B * H, splits, D].
      largest, total: [B * H, splits].
    """

    mixed: jax.Array
    largest: jax.Array
    total: jax.Array

    @classmethod
    def describe(cls, heads: int, splits: int, features: int) -> Partials:
        """Their shapes, for B * H heads."""
        flat: Any = jax.ShapeDtypeStruct((heads, splits), jnp.float32)
        mixed: Any = jax.ShapeDtypeStruct((heads, splits, features), jnp.float32)
        return cls(mixed, flat, flat)


def store_partials(
    refs: Any, sums: Sums, heads: jax.Array, there: jax.Array, split: jax.Array
) -> None:
    """Within a kernel: write the sums of one split.

    Args:
      refs: `Partials` of references.
      heads: int32 [G], of all B * H; `there`: which of them are not padding.
    """
    features = jnp.arange(sums.mixed.shape[0], dtype=jnp.int32)[:, None]
    mask = there[None, :] & (features < refs.mixed.shape[2])
    plgpu.store(refs.mixed.at[heads[None, :], split, features], sums.mixed, mask=mask)
    plgpu.store(refs.largest.at[heads, split], sums.largest, mask=there)
    plgpu.store(refs.total.at[heads, split], sums.total, mask=there)


def combine_splits(
    partials: Partials,
    position: jax.Array,
    active: jax.Array,
    *,
    window: int | None,
    gate: Parts | None = None,
    dtype: Any,
    interpret: bool = False,
) -> jax.Array:
    """The result of each head, [B, H * D] in `dtype`.

    Args:
      position, active: int32 [B], as in `attend_token`.
      gate: [B, H * 2D]: of each head D features that are not used here, and D of the gate.
    """
    rows, _, features = partials.mixed.shape
    batch, chunk = position.shape[0], min(pad(features), _MOST_FEATURES)
    result = pl.pallas_call(
        functools.partial(_combine_head, window=window, chunk=chunk),
        out_shape=jax.ShapeDtypeStruct((rows, features), dtype),
        grid=(rows * pl.cdiv(features, chunk),),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="flash_combine",
    )(partials, position, active, gate)
    return result.reshape(batch, -1)


def _combine_head(
    partials, position_ref, active_ref, gate, out_ref, *, window: int | None, chunk: int
) -> None:
    """Some features of one head."""
    rows, splits, features = partials.mixed.shape
    number, part = divide(pl.program_id(0), pl.cdiv(features, chunk))
    row, head = divide(number, rows // position_ref.shape[0])
    split = jnp.arange(splits, dtype=jnp.int32)
    column = part * chunk + jnp.arange(chunk, dtype=jnp.int32)
    first, end = find_seen(position_ref[row], active_ref[row], window)
    works = find_span(first, end, splits, split).works
    inside = column < features
    largest = plgpu.load(partials.largest.at[number, split], mask=works, other=-jnp.inf)
    total = plgpu.load(partials.total.at[number, split], mask=works, other=0)
    mixed = plgpu.load(
        partials.mixed.at[number, split[:, None], column[None, :]],
        mask=works[:, None] & inside[None, :],
        other=0,
    )
    weights = jnp.exp2(largest - jnp.max(largest, axis=0))
    mean = jnp.sum(mixed * weights[:, None], axis=0) / jnp.sum(total * weights, axis=0)
    mean = mean.astype(out_ref.dtype)
    if gate is not None:
        mean = apply_gate(mean, gate, row, (2 * head + 1) * features + column, inside)
    plgpu.store(out_ref.at[number, column], mean, mask=inside)


def apply_gate(
    mean: jax.Array, gate: Any, row: jax.Array, columns: jax.Array, mask: jax.Array
) -> jax.Array:
    """Times sigmoid(gate), of `Parts` of references; rounded as a model in that dtype would."""
    wide = load_sum(gate, row, columns, mask).astype(mean.dtype).astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(wide).astype(mean.dtype).astype(jnp.float32)
    return (mean.astype(jnp.float32) * sigmoid).astype(mean.dtype)
