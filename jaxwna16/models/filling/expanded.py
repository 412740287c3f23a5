"""Weights that files hold packed and a model holds as floats: they are expanded once, at load.

An embedding's rows are looked up and not multiplied, routers and gates of shared experts have too
few features for a kernel, and experts are packed in both products or in none. The model decides
which they are: where it has a `weight`, it holds floats.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Mapping
from typing import Any

import jax

from jaxwna16.models.filling.renaming import rename
from loaders.plan import Plan
from pallas_kernels.format.dequantize import dequantize
from pallas_kernels.format.spec import QuantSpec


def list_expanded(
    specs: Mapping[str, QuantSpec], places: Collection[str], names: Mapping[str, str]
) -> dict[str, QuantSpec]:
    """Path in the files -> spec of each packed weight that the model holds as floats.

    Args:
      specs: of all packed weights, by path in the files.
      places: paths of the model's leaves.
      names: how the files' names differ from these, see `rename`.
    """
    return {p: spec for p, spec in specs.items() if f"{rename(p, names)}.weight" in places}


def describe_all(
    described: Mapping[str, jax.ShapeDtypeStruct], expanded: Mapping[str, QuantSpec]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a plan after `expand_all`, by their names in the files.

    Args:
      described: the same before, as `Plan.describe_leaves` has them.
      expanded: from `list_expanded`.
    """
    leaves = {}
    for name, leaf in described.items():
        path, _, role = name.rpartition(".")
        spec = expanded.get(path)
        if spec is None or role == "bias":
            leaves[name] = leaf
        elif role == "scale":
            shape = (*leaf.shape[:-2], spec.out_features, spec.in_features)
            leaves[f"{path}.weight"] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    return leaves


def expand_all(params: dict[str, Any], expanded: Mapping[str, QuantSpec], dtype: Any) -> None:
    """Put floats of a dtype in place of the packed weights of a params tree, one by one."""
    for path, spec in expanded.items():
        *parents, name = path.split(".")
        tree = functools.reduce(operator.getitem, parents, params)
        held = {"bias": tree[name].pop("bias")} if "bias" in tree[name] else {}
        tree[name] = {"weight": _expand(tree[name], spec, dtype), **held}


def describe_expanded(plan: Plan, expanded: Collection[str]) -> list[str]:
    """A warning about experts, which are no small part of a model."""
    stacks = [path for path in expanded if path in plan.stacks]
    if not stacks:
        return []
    more = f" and {len(stacks) - 1} more stacks" if len(stacks) > 1 else ""
    return [
        f"{stacks[0]}{more}: expanded to floats, since the other product of these experts is not "
        "packed"
    ]


def _expand(weights: dict[str, Any], spec: QuantSpec, dtype: Any) -> jax.Array:
    one = functools.partial(dequantize, spec=spec, dtype=dtype)
    if spec.packed_shape == weights["packed"].shape:
        return one(weights)
    # expert by expert: what expanding takes beside the result is a multiple of that
    return jax.lax.map(one, weights)
