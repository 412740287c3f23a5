"""Rows of a packed weight as a packed weight by itself, exactly."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.format.spec import TILE_N, QuantSpec
from pallas_kernels.format.weights import check_weights


def take_rows(
    weights: Mapping[str, jax.Array], spec: QuantSpec, rows: jax.typing.ArrayLike | Sequence[int]
) -> dict[str, jax.Array]:
    """Take output features of a packed weight: all tiles, scales and zero points are per row.

    Where a row lies in its tile does not matter, so that any rows can be taken, in any order.

    Args:
      weights: the leaf dict of one weight.
      spec: its facts.
      rows: integers [n] from 0 to N - 1, at least one.

    Returns:
      The leaf dict of those rows, for `spec` with n out features. `perm` is the same array.

    Raises:
      SpecError: if the arrays contradict the spec.
    """
    check_weights(weights, spec)
    rows = jnp.asarray(rows, jnp.int32)
    leaves = dict(weights)
    perm = {"perm": leaves.pop("perm")} if "perm" in leaves else {}
    return _take_rows(leaves, rows, dataclasses.replace(spec, out_features=rows.size)) | perm


@functools.partial(jax.jit, static_argnames="spec")
def _take_rows(
    leaves: dict[str, jax.Array], rows: jax.Array, spec: QuantSpec
) -> dict[str, jax.Array]:
    """`spec` is that of the result."""
    taken = {}
    missing = spec.tiles_n * TILE_N - spec.out_features
    for name, leaf in leaves.items():
        if name == "packed":
            held = leaf[rows // TILE_N, :, rows % TILE_N]
            held = jnp.pad(held, ((0, missing), (0, 0), (0, 0)))
            tiles = held.reshape(spec.tiles_n, TILE_N, spec.tiles_k, -1)
            taken[name] = tiles.transpose(0, 2, 1, 3)
        elif name == "bias":
            taken[name] = leaf[rows]
        else:
            taken[name] = jnp.pad(leaf[:, rows], ((0, 0), (0, missing)))
    return taken
