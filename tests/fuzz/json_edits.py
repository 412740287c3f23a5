"""Edits of a JSON tree, and how trees are written that Python's own writer cannot write."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.values import DEEP, HUGE, VERY_DEEP, WEIRD

_DUPLICATE = "@duplicate@"
_WRITTEN = {
    HUGE: "9" * 5000,
    DEEP: "[" * 400 + "]" * 400,
    VERY_DEEP: "[" * 100_000 + "]" * 100_000,
}


def pick(draw: Callable, options: Sequence) -> Any:
    """One of them."""
    return draw(st.sampled_from(list(options)))


def edit_tree(draw: Callable, tree: Any) -> str:
    """Change one node of a tree in place, and say how."""
    places = list(_list_places(tree))
    if not places:
        return "nothing"
    path, parent, key = pick(draw, places)
    kind = pick(draw, ["replace", "replace", "delete", "rename", "double", "swap", "wrap"])
    if kind == "replace":
        parent[key] = copy.deepcopy(pick(draw, WEIRD))  # which the next edit may be of
    elif kind == "delete":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw(st.text(max_size=6)) or f"{key} "] = parent.pop(key)
    elif kind == "double" and isinstance(parent, dict):
        parent[f"{_DUPLICATE}{key}"] = copy.deepcopy(pick(draw, [parent[key], *WEIRD]))
    elif kind == "swap":
        _, other, name = pick(draw, places)
        parent[key], other[name] = other[name], parent[key]
    else:
        parent[key] = pick(draw, [[parent[key]], {"x": parent[key]}, [parent[key]] * 2])
    return f"{kind} {path}"


def dump(tree: Any) -> bytes:
    """JSON in which marked keys stand twice, and marked values are huge or nested deeply."""
    try:
        text = json.dumps(tree)
    except (ValueError, RecursionError):  # swapping made a circle
        return b"{}"
    for mark, written in _WRITTEN.items():
        text = text.replace(json.dumps(mark), written)
    return text.replace(_DUPLICATE, "").encode()


def _list_places(tree: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every node below the root: its path, the list or object it is in, and its key there."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        where = f"{path}/{key}"
        yield where, tree, key
        if isinstance(value, dict | list):
            yield from _list_places(value, where)
