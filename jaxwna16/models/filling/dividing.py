"""Modules of the files that are several modules of the model: their rows are dealt out.

A plan, its warnings and errors keep the files' own modules. The model is made for the parts, and
what was read is divided module by module when it is filled: beside the arrays that stay, that takes
one module's parts.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax

from jaxwna16.errors import ModelError
from jaxwna16.models.config.fused import Fused
from loaders.plan import Plan
from pallas_kernels.format.rows import take_rows
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import make_abstract

Leaf = TypeVar("Leaf")
_PLAIN = ("weight", "bias")
_PACKED = ("packed", "scale", "zero_point", "perm", "bias")
Found = Mapping[str, Fused]
"""Path in the files of each module that is divided -> what its rows are."""


def find_fused(plan: Plan, kinds: Iterable[Fused]) -> dict[str, Fused]:
    """The modules of a plan that are divided, packed or not.

    Args:
      plan: of the checkpoint.
      kinds: what the family has of them.

    Raises:
      ModelError: listing those with another number of rows, and parts that are there twice.
    """
    kinds = tuple(kinds)
    if not kinds:
        return {}
    split = {name: name.rpartition(".")[::2] for name in plan.plain}
    counts = {
        path: (*plan.plain[name].shape, 0)[0]
        for name, (path, role) in split.items()
        if role in _PLAIN
    }
    counts |= {path: spec.out_features for path, spec in plan.specs.items()}
    found = {path: kind for path in counts if (kind := _find_kind(path, kinds)) is not None}
    reasons = [
        f"{path}: expected {kind.rows} rows ({_word_parts(kind)}), found {counts[path]}"
        for path, kind in found.items()
        if counts[path] != kind.rows
    ]
    reasons += [
        f"{part}: expected it in {path} alone, found both"
        for path, kind in found.items()
        for part in _list_paths(path, kind)
        if part in counts
    ]
    if reasons:
        raise ModelError(f"{plan.folder}: fused modules do not fit the model", reasons)
    return found


def list_parts(name: str, found: Found) -> list[str]:
    """The tensors that one of the files becomes; it alone if it is not divided."""
    path, _, role = name.rpartition(".")
    if path not in found:
        return [name]
    return [f"{part}.{role}" for part in _list_paths(path, found[path])]


def name_sources(
    places: Iterable[str], described: Iterable[str], kinds: Iterable[Fused]
) -> dict[str, str]:
    """What files call those leaves of a model of whose module, and of its neighbours, they have
    nothing: they lack the module that is divided.

    Args:
      places: paths of the model's leaves.
      described: those that the files fill.
      kinds: what the family has of such modules.
    """
    held = {name.rpartition(".")[0] for name in described}
    sources = {}
    for name in places:
        path, _, role = name.rpartition(".")
        parent, _, part = path.rpartition(".")
        for kind in kinds:
            above, _, own = kind.name.rpartition(".")
            if part in kind.parts and _ends_with(parent, above):
                source = f"{parent}.{own}"
                if held.isdisjoint(_list_paths(source, kind)):
                    sources[name] = f"{source}.{role}"
    return sources


def divide_specs(specs: Mapping[str, QuantSpec], found: Found) -> dict[str, QuantSpec]:
    """The specs of the parts in place of those of what is divided."""
    divided = {}
    for path, spec in specs.items():
        if path not in found:
            divided[path] = spec
            continue
        for part, rows in _list_paths(path, found[path]).items():
            divided[part] = dataclasses.replace(spec, out_features=rows.size)
    return divided


def describe_divided(
    described: Mapping[str, jax.ShapeDtypeStruct], specs: Mapping[str, QuantSpec], found: Found
) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a plan after `divide_all`, by their names in the files.

    Args:
      described: the same before, as `Plan.describe_leaves` has them.
      specs: of all packed weights before.
      found: from `find_fused`.
    """
    leaves = {}
    for name, leaf in described.items():
        path, _, role = name.rpartition(".")
        spec = specs.get(path)
        if path not in found or role not in (_PLAIN if spec is None else _PACKED):
            leaves[name] = leaf
            continue
        for part, rows in _list_paths(path, found[path]).items():
            leaves[f"{part}.{role}"] = _describe_part(leaf, role, rows.size, spec)
    return leaves


def divide_all(params: dict[str, Any], specs: Mapping[str, QuantSpec], found: Found) -> None:
    """Put the parts in place of what is divided in a params tree, one by one."""
    for path, kind in found.items():
        *parents, name = path.split(".")
        tree = functools.reduce(operator.getitem, parents, params)
        fused = tree.pop(name)
        for part, rows in kind.parts.items():
            taken = _take(fused, rows, specs.get(path))
            # one after the other: what is divided may be freed only then
            tree[part] = jax.block_until_ready(taken)


def _take(leaves: dict[str, Any], rows: Any, spec: QuantSpec | None) -> dict[str, Any]:
    if spec is not None:
        return take_rows(leaves, spec, rows)
    return {name: leaf[rows] for name, leaf in leaves.items()}


def _describe_part(
    leaf: jax.ShapeDtypeStruct, role: str, rows: int, spec: QuantSpec | None
) -> jax.ShapeDtypeStruct:
    if spec is None or role == "bias":
        return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)
    part = make_abstract(dataclasses.replace(spec, out_features=rows), leaf.dtype, act_order=True)
    return jax.ShapeDtypeStruct(part[role].shape, leaf.dtype)


def _find_kind(path: str, kinds: Iterable[Fused]) -> Fused | None:
    return next((kind for kind in kinds if _ends_with(path, kind.name)), None)


def _ends_with(path: str, end: str) -> bool:
    return not end or path == end or path.endswith(f".{end}")


def _list_paths(path: str, kind: Fused) -> dict[str, Any]:
    """The paths of the parts -> their rows."""
    parent = path.rpartition(".")[0]
    return {f"{parent}.{part}" if parent else part: rows for part, rows in kind.parts.items()}


def _word_parts(kind: Fused) -> str:
    return ", ".join(f"{rows.size} of {part}" for part, rows in kind.parts.items())
