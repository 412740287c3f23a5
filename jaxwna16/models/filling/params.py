"""Filling a model's leaves from a checkpoint's tree, by path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwna16.errors import ModelError
from jaxwna16.layers.dense import QuantDense
from jaxwna16.layers.moe import ExpertStack
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.filling.renaming import rename_all

_PACKED_MODULES = (QuantDense, ExpertStack)

Model = TypeVar("Model", bound=CausalLM)


def fill_model(
    model: Model, params: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> Model:
    """Give a model, usually an abstract one of `nnx.eval_shape`, the arrays of a params tree.

    Plain weights, norms and biases are cast to the model's dtype, except a few that are always
    float32. Leaves of quantized linears and experts are taken as they are. Leaves without a place
    in the model that `check_leaves` accepts are left out.

    Args:
      model: what to fill.
      params: nested dict under the checkpoint's module paths, keys strings.
      names: how those differ from the model's, see `rename`; None is not at all.

    Raises:
      ModelError: as `check_leaves`, and listing leaves that have the same place.
    """
    found = rename_all(dict(_flatten(params, "")), names or {})
    graph, state = nnx.split(model)
    check_leaves(_list_leaves(state), found)
    packed = {p for p, module in nnx.iter_modules(model) if isinstance(module, _PACKED_MODULES)}
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        array = found[".".join(map(str, path))]
        kept = array.dtype if path[:-1] in packed else variable.get_value().dtype
        leaves.append((path, variable.replace(jnp.asarray(array, kept))))
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def check_leaves(
    places: Mapping[str, Any],
    found: Mapping[str, Any],
    source: str = "parameters",
    *,
    called: Mapping[str, str] | None = None,
) -> None:
    """Check that leaves (arrays, or only their shapes and dtypes) are those of a model.

    `rotary_emb.inv_freq` of old checkpoints is accepted: the model computes it itself.

    Args:
      places: path of each leaf of the model -> something with `shape` and `dtype`.
      found: the same of the leaves to check.
      source: what the leaves come from, for the message.
      called: what is called otherwise there, by path in the model, for the message, too.

    Raises:
      ModelError: listing every leaf that is missing, unexpected, of another shape or of another
        kind of number.
    """
    faults, unexpected, called = [], dict(found), called or {}
    for name, wanted in places.items():
        leaf = unexpected.pop(name, None)
        if leaf is None or leaf.shape != wanted.shape or not _same_kind(leaf, wanted):
            expected, source_name = _describe(wanted), called.get(name, name)
            expected += f" for {name}" if source_name != name else ""
            faults.append(f"{source_name}: expected {expected}, found {_describe(leaf)}")
    faults += [
        f"{name}: expected nothing, found {_describe(leaf)}"
        for name, leaf in unexpected.items()
        if not name.endswith("rotary_emb.inv_freq")
    ]
    if faults:
        raise ModelError(f"{source} do not fit the model", faults)


def list_leaves(model: CausalLM) -> dict[str, Any]:
    """Path of each leaf of a model -> its array, or shape and dtype."""
    return _list_leaves(nnx.state(model))


def _list_leaves(state: nnx.State) -> dict[str, Any]:
    leaves = nnx.to_flat_state(state)
    return {".".join(map(str, path)): variable.get_value() for path, variable in leaves}


def _flatten(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _same_kind(array: Any, wanted: jax.ShapeDtypeStruct) -> bool:
    """Any float may stand for another, an integer only for itself."""
    if jnp.issubdtype(wanted.dtype, jnp.floating):
        return jnp.issubdtype(array.dtype, jnp.floating)
    return array.dtype == wanted.dtype


def _describe(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype.name} {list(leaf.shape)}"
