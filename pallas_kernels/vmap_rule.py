"""`vmap` over rows, folded into one larger product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def fold_vmap(run: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Wrap `run(rows, weights)` so that `vmap` over rows alone becomes one call with more rows.

    Args:
      run: a function of two trees of arrays, whose results have the rows' leading axis.
    """

    @jax.custom_batching.custom_vmap
    def call(rows, weights):
        return run(rows, weights)

    @call.def_vmap
    def call_batched(axis_size, in_batched, rows, weights):
        if any(jax.tree.leaves(in_batched[1])):
            axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
            ys = jax.vmap(run, in_axes=tuple(axes))(rows, weights)
        else:

            def fold(leaf, batched):
                if not batched:
                    leaf = jnp.broadcast_to(leaf[None], (axis_size, *leaf.shape))
                return leaf.reshape(-1, *leaf.shape[2:])

            ys = call(jax.tree.map(fold, rows, in_batched[0]), weights)
            ys = jax.tree.map(lambda y: y.reshape(axis_size, -1, *y.shape[1:]), ys)
        return ys, jax.tree.map(lambda y: True, ys)

    return call
