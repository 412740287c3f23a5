"""Products of one x by any weights: those that are alike in one kernel, each in the tiles chosen
for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.tiles.dense_rules import choose
from pallas_kernels.tiles.device import find_device
from pallas_kernels.tiles.tiles import Tiles
from pallas_kernels.triton.dense import expand_by_kernel, multiply_in_parts
from pallas_kernels.triton.parts import Parts

Weights = Mapping[str, jax.Array]


def multiply_each(
    x: jax.Array,
    weights: Sequence[Weights],
    specs: Sequence[QuantSpec],
    *,
    prefer: str = "speed",
    interpret: bool = False,
) -> list[Parts]:
    """x [M, K] times each weight, as `Parts` of [M, N]; leaf dicts may have "bias" and "perm"."""
    results: dict[int, Parts] = {}
    for members in group_alike(weights, specs):
        first = weights[members[0]]
        rows = jnp.take(x, first["perm"], axis=1) if "perm" in first else x
        parts = multiply_alike(
            rows,
            [{n: leaf for n, leaf in weights[i].items() if n != "perm"} for i in members],
            [specs[i] for i in members],
            prefer=prefer,
            interpret=interpret,
        )
        results.update(zip(members, parts, strict=True))
    return [results[i] for i in range(len(specs))]


def multiply_alike(
    x: jax.Array,
    weights: Sequence[Weights],
    specs: Sequence[QuantSpec],
    *,
    activation: str | None = None,
    prefer: str = "speed",
    interpret: bool = False,
) -> list[Parts]:
    """As `multiply_in_parts`, for weights that differ only in N; expanded where that is faster."""
    together = sum(spec.out_features for spec in specs)
    schedule = choose(
        dataclasses.replace(specs[0], out_features=together),
        x.shape[0],
        x.dtype,
        weights[0]["scale"].dtype,
        find_device(),
        prefer,
    )
    if isinstance(schedule, Tiles):
        return multiply_in_parts(
            x, weights, specs, schedule, activation=activation, interpret=interpret
        )
    return [
        _multiply_expanded(x, expand_by_kernel(w, spec, x.dtype, interpret=interpret), w)
        for w, spec in zip(weights, specs, strict=True)
    ]


def group_alike(weights: Sequence[Weights], specs: Sequence[QuantSpec]) -> list[list[int]]:
    """Which weights run in one kernel: those whose specs differ only in N."""
    calls: dict[Any, list[int]] = {}
    for i, (weight, spec) in enumerate(zip(weights, specs, strict=True)):
        alike = dataclasses.replace(spec, out_features=1), weight["scale"].dtype
        # a reordered x is shared with nobody
        calls.setdefault((alike, i if "perm" in weight else None), []).append(i)
    return list(calls.values())


def _multiply_expanded(x: jax.Array, w: jax.Array, weights: Weights) -> Parts:
    y = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)
    return Parts(y[None], weights.get("bias"))
