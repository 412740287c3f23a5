"""What goes from layer to layer: the stream, and what each layer is told of its tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.formulas.norms import Norm
from pallas_kernels.formulas.rotation import Rotation

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rotation", "start", "lengths", "beside"),
    meta_fields=("window",),
)
@dataclasses.dataclass(frozen=True)
class Piece:
    """What a layer is told of the tokens.

    Attributes:
      rotation: of the positions; None where the layer does not rotate heads.
      start: int32 [B], how many tokens of each row come before.
      lengths: int32 [B], how many tokens of each row are no padding.
      window: how many tokens each attends to, itself included; None is all before it.
      beside: what the layer takes of the tokens beside the stream [B, S, ...], where a family has
        such.
    """

    rotation: Rotation | None
    start: Array
    lengths: Array
    window: int | None
    beside: Array | None = None


class Following(NamedTuple):
    """What comes after a layer.

    Attributes:
      norm: of the stream: the next layer's first or the decoder's last; None if the next layer
        takes the stream itself.
      ahead: packed words that the next layer multiplies with first, where they are read ahead
        (`pallas_kernels.tiles.ahead`).
    """

    norm: Norm | None
    ahead: tuple[Array, ...] = ()


class Stream(NamedTuple):
    """What goes from layer to layer, [B, S, hidden] both.

    Attributes:
      x: the residual stream.
      normalised: its norm, which the next layer (or the head) takes; None if that takes x itself.
    """

    x: Array
    normalised: Array | None = None

    @property
    def taken(self) -> Array:
        """What the next product takes."""
        return self.x if self.normalised is None else self.normalised


def find_positions(start: jax.Array, count: jax.Array, steps: int) -> jax.Array:
    """Positions int32 [B, S] of S tokens of which the first `count` are real.

    Padding behind them takes the position of the last one, so that it computes with ordinary
    numbers.

    Args:
      start, count: int32 [B], how many tokens come before the piece, and how many are in it.
      steps: S.
    """
    step = jnp.arange(steps, dtype=jnp.int32)[None, :]
    return start[:, None] + jnp.minimum(step, jnp.maximum(count - 1, 0)[:, None])
