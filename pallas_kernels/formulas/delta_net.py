"""`DeltaNet`: the weights of a gated delta net beside its products, and what it keeps of tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["conv_weight", "A_log", "dt_bias", "norm_weight"],
    meta_fields=["norm_eps", "key_heads"],
)
@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """A layer with Hv value heads; `pallas_kernels.xla.delta_rule` has the formulas.

    Attributes:
      conv_weight: [C, W] of the convolution; conv_weight[:, W - 1] multiplies the newest input.
      A_log, dt_bias: float32 [Hv], of the decay exp(-exp(A_log) softplus(a + dt_bias)).
      norm_weight: [Dv], of the result.
      norm_eps: of that norm.
      key_heads: Hv / key_heads value heads share a key head.
    """

    conv_weight: Array
    A_log: Array
    dt_bias: Array
    norm_weight: Array
    norm_eps: float
    key_heads: int

    @property
    def value_dim(self) -> int:
        """Dv."""
        return self.norm_weight.shape[0]

    @property
    def key_dim(self) -> int:
        """Dk; the C features are queries and keys of all key heads, and all values."""
        values = self.A_log.shape[0] * self.value_dim
        return (self.conv_weight.shape[0] - values) // (2 * self.key_heads)


class DeltaCache(NamedTuple):
    """What a gated delta-net layer keeps of the tokens before.

    Attributes:
      inputs: [B, W - 1, C], the last inputs of the convolution of width W, the newest last.
      state: float32 [B, value heads, Dk, Dv].
    """

    inputs: Array
    state: Array


def make_delta_cache(
    batch: int,
    width: int,
    features: int,
    heads: tuple[int, int, int],
    dtype: jax.typing.DTypeLike,
) -> DeltaCache:
    """What stands before the first token: zeros.

    Args:
      width: W, tokens that the convolution spans.
      features: C, of its inputs.
      heads: value heads, Dk and Dv.
      dtype: of the inputs.
    """
    inputs = jnp.zeros((batch, width - 1, features), dtype)
    return DeltaCache(inputs, jnp.zeros((batch, *heads), jnp.float32))
