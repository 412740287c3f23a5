"""`Parts`: a product whose splits of K are not yet added, which the kernel after it does.

So a split product costs no kernel of its own for its sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.formulas.activations import apply


class Parts(NamedTuple):
    """A product y [M, N] before its last rounding: the sum of its parts in order, plus the bias.

    Attributes:
      sums: [P, M, N]; float32, or already rounded to the dtype of x if P is 1.
      bias: [N], or None.
    """

    sums: jax.Array
    bias: jax.Array | None = None

    @property
    def features(self) -> int:
        """N."""
        return self.sums.shape[-1]


def add_parts(parts: Parts) -> jax.Array:
    """The product as float32 [M, N], outside of a kernel."""
    total = parts.sums[0].astype(jnp.float32)
    for part in parts.sums[1:]:
        total = total + part
    return total if parts.bias is None else total + parts.bias.astype(jnp.float32)[None, :]


def finish(parts: Sequence[Parts], dtype: Any, activation: str | None = None) -> list[jax.Array]:
    """The products in `dtype`.

    Args:
      activation: of gate and up, whose result act(gate) * up is, unless it is there already; None
        of other products.
    """
    if activation is not None and len(parts) > 1:
        gate, up = map(add_parts, parts)
        return [apply(activation, gate, up).astype(dtype)]
    return [add_parts(part).astype(dtype) for part in parts]


def load_sum(parts: Any, row: Any, columns: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The same within a kernel, where `parts` holds references: one row at `columns`, float32.

    Added in order, so that equal inputs give equal bits. Where `mask` is False, 0.
    """
    options = {} if mask is None else {"mask": mask, "other": 0}
    total = plgpu.load(parts.sums.at[0, row, columns], **options).astype(jnp.float32)
    for part in range(1, parts.sums.shape[0]):
        total = total + plgpu.load(parts.sums.at[part, row, columns], **options)
    if parts.bias is None:
        return total
    return total + plgpu.load(parts.bias.at[columns], **options).astype(jnp.float32)
