"""Filling a model's leaves from a checkpoint's tree, by path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwna16.errors import ModelError
from jaxwna16.models.layers import Dense, Embedding, RMSNorm
from jaxwna16.models.llama import Llama
from jaxwna16.models.moe import Router, Stack

_PLAIN_MODULES = (Dense, Embedding, RMSNorm, Router, Stack)


def load_params(model: Llama, params: Mapping[str, Any]) -> Llama:
    """Give a model, usually an abstract one of `nnx.eval_shape`, the arrays of a params tree.

    Plain weights, norms and biases are cast to the dtype the model was constructed with (a router's
    correction bias to float32); leaves of quantized linears and experts are taken as they are.
    Leaves that `check_leaves` lets pass though the model has no place for them are left out.

    Args:
      model: what to fill.
      params: nested dict under the checkpoint's module paths, keys strings.

    Raises:
      ModelError: as `check_leaves`.
    """
    found = dict(_list_leaves(params, ""))
    check_leaves(model, found)
    graph, state = nnx.split(model)
    plain = {path for path, module in nnx.iter_modules(model) if isinstance(module, _PLAIN_MODULES)}
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        array = found[".".join(map(str, path))]
        kept = variable.get_value().dtype if path[:-1] in plain else array.dtype
        leaves.append((path, variable.replace(jnp.asarray(array, kept))))
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def check_leaves(model: Llama, found: Mapping[str, Any], source: str = "parameters") -> None:
    """Check that leaves (arrays, or only their shapes and dtypes) are those of a model.

    Two things of old checkpoints are let pass: `rotary_emb.inv_freq`, and a copy of a tied
    embedding under `lm_head.weight`.

    Args:
      model: the model, possibly abstract.
      found: path of each leaf -> something with `shape` and `dtype`.
      source: what the leaves come from, for the message.

    Raises:
      ModelError: listing every leaf that is missing, unexpected, of another shape or of another
        kind of number.
    """
    faults, unexpected = [], dict(found)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, wanted = ".".join(map(str, path)), variable.get_value()
        leaf = unexpected.pop(name, None)
        if leaf is None or leaf.shape != wanted.shape or not _same_kind(leaf, wanted):
            faults.append(f"{name}: expected {_describe(wanted)}, found {_describe(leaf)}")
    faults += [
        f"{name}: expected nothing, found {_describe(leaf)}"
        for name, leaf in unexpected.items()
        if not _is_leftover(name, leaf, model)
    ]
    if faults:
        raise ModelError(f"{source} do not fit the model", faults)


def _list_leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _list_leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_leftover(name: str, array: Any, model: Llama) -> bool:
    """Whether a leaf without a place repeats what the model knows anyway."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    embedding = model.model.embed_tokens.weight.get_value()
    return model.lm_head is None and name == "lm_head.weight" and array.shape == embedding.shape


def _same_kind(array: Any, wanted: jax.ShapeDtypeStruct) -> bool:
    """Any float may stand for another, an integer only for itself."""
    if jnp.issubdtype(wanted.dtype, jnp.floating):
        return jnp.issubdtype(array.dtype, jnp.floating)
    return array.dtype == wanted.dtype


def _describe(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype.name} {list(leaf.shape)}"
