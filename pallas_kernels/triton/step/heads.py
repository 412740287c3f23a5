"""Heads of one new token, within a kernel: the sum of a product's parts, normalised and rotated.

A feature is rotated together with its partner, half of the rotated features away or its neighbour.
So both are loaded, and a head of any size is one vector: the halves need not be powers of two.

Every step rounds as those of `jaxwna16.models.parts` do. Products of two 16-bit floats are exact in
float32, so with cosines and sines of 16 bits a head has the same bits on every device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.formulas.norms import Norm
from pallas_kernels.tiles.attention.decode_rules import pad
from pallas_kernels.triton.parts import load_sum


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of a head, a power of two of them, and their partners in the rotation.

    Attributes:
      head_dim: D; what is past it is padding.
      rotated: R.
      paired: whether neighbours are rotated together, and not the halves of R.
    """

    head_dim: int
    rotated: int
    paired: bool = False

    @property
    def own(self) -> jax.Array:
        """int32 [1, D padded]."""
        return jnp.arange(pad(self.head_dim), dtype=jnp.int32)[None, :]

    @property
    def partner(self) -> jax.Array:
        """The other feature of each pair; where nothing is rotated, the same."""
        own, step = self.own, 1 if self.paired else self.rotated // 2
        moved = jnp.where(self.is_first, own + step, own - step)
        return jnp.where(own < self.rotated, moved, own)

    @property
    def is_first(self) -> jax.Array:
        """bool [1, D padded]: which are the first of their pair."""
        return (self.own & 1) == 0 if self.paired else self.own < self.rotated // 2

    @property
    def angle(self) -> jax.Array:
        """int32 [1, D padded]: which of the R / 2 angles turns each rotated feature."""
        own, half = self.own, self.rotated // 2
        return own >> 1 if self.paired else jnp.where(own < half, own, own - half)

    @property
    def inside(self) -> jax.Array:
        """bool [1, D padded]: which are features."""
        return self.own < self.head_dim


def load_head(
    parts: Any,
    row: jax.Array,
    starts: jax.Array,
    features: Features,
    rotation: tuple[Any, Any] | None,
    norm: Norm | None,
    dtype: Any,
    wanted: jax.Array | None = None,
    norm_last: bool = False,
) -> jax.Array:
    """Some heads of one row of a product, normalised and rotated, in `dtype`; padding is 0.

    Args:
      parts: `Parts` of references.
      starts: int32 [G, 1], the first feature of each head.
      rotation: references to cosines and sines [B, R / 2]; None if no feature is rotated.
      norm: whose weight is a reference.
      wanted: whether to load anything, or get zeros.
      norm_last: whether to normalise after the rotation.

    Returns:
      [G, D padded].
    """
    own = features.own
    columns = [own] if rotation is None else [own, features.partner]
    shape = (starts.shape[0], own.shape[1])
    mask = features.inside if wanted is None else features.inside & wanted
    mask = jnp.broadcast_to(mask, shape)
    heads = [load_sum(parts, row, starts + column, mask).astype(dtype) for column in columns]
    if norm is not None and not norm_last:
        heads = _normalise(heads, columns, norm, features)
    if rotation is not None:
        x, other = heads
        turned = _turn(x, other, row, features, rotation)
        heads = [jnp.where(jnp.broadcast_to(own < features.rotated, shape), turned, x)]
    if norm is not None and norm_last:
        heads = _normalise(heads, [own], norm, features)
    return heads[0]


def _normalise(
    heads: list[jax.Array], columns: list[jax.Array], norm: Norm, features: Features
) -> list[jax.Array]:
    """Heads [G, D padded], and the same with their features in another order, of those columns."""
    wide = heads[0].astype(jnp.float32)
    mean = jnp.sum(wide * wide, axis=1) / features.head_dim
    factor = lax.rsqrt(mean + norm.eps)[:, None]
    return [
        _scale(x, factor, norm, column, features.inside)
        for x, column in zip(heads, columns, strict=True)
    ]


def _scale(
    x: jax.Array, factor: jax.Array, norm: Norm, columns: jax.Array, mask: jax.Array
) -> jax.Array:
    """Times the norm's factor [G, 1] and the weights of these features, in the dtype of x."""
    ref: Any = norm.weight
    weight = plgpu.load(ref.at[columns], mask=mask, other=0).astype(jnp.float32)
    normalised = x.astype(jnp.float32) * factor
    if norm.kind == "rounded":
        normalised = normalised.astype(x.dtype).astype(jnp.float32)
    return (normalised * (weight + 1 if norm.kind == "offset" else weight)).astype(x.dtype)


def _turn(
    x: jax.Array, other: jax.Array, row: jax.Array, features: Features, rotation: tuple[Any, Any]
) -> jax.Array:
    """x cos -+ partner sin, in the dtype of x.

    Cosines of the same dtype round each product, as an expression in that dtype would.
    """
    place, is_turned = features.angle, features.own < features.rotated
    cos, sin = (
        plgpu.load(table.at[row, place], mask=is_turned, other=0).astype(jnp.float32)
        for table in rotation
    )
    products = (x.astype(jnp.float32) * cos, other.astype(jnp.float32) * sin)
    if rotation[0].dtype == x.dtype:
        products = tuple(p.astype(x.dtype).astype(jnp.float32) for p in products)
    first, second = products
    return (first + jnp.where(features.is_first, -second, second)).astype(x.dtype)
