"""The model that a plan is for, without its arrays, and what fills it: `fit_model`, then `fill`."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwna16.dtypes import read_dtype
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.config.fused import Fused
from jaxwna16.models.config.language_config import LanguageConfig, describe_length
from jaxwna16.models.families import Family, Names, find_family
from jaxwna16.models.filling.dividing import (
    describe_divided,
    divide_all,
    divide_specs,
    find_fused,
    list_parts,
    name_sources,
)
from jaxwna16.models.filling.expanded import (
    describe_all,
    describe_expanded,
    expand_all,
    list_expanded,
)
from jaxwna16.models.filling.params import check_leaves, fill_model, list_leaves
from jaxwna16.models.filling.renaming import check_depth, check_prefix, rename, rename_all
from jaxwna16.models.filling.skipped import drop_skipped
from jaxwna16.models.filling.tied_head import drop_tied_head, settle_tie
from jaxwna16.models.filling.zero_biases import drop_zero_biases
from loaders.plan import Plan
from pallas_kernels.backends import check_backend
from pallas_kernels.format.spec import QuantSpec

_NO_HEAD = "no lm_head in the files: the model gives hidden states, and neither logits nor text"


@dataclasses.dataclass(frozen=True)
class Fit:
    """A model without its arrays, and the checkpoint that has a part for each of its leaves.

    Attributes:
      model: the abstract model.
      plan: of the parts that are for it.
      names: how the files' names differ from the model's, see `rename`.
      fused: path in the files -> what is one module there and several in the model.
      expanded: path -> spec of what is packed in the files and floats in the model, after that.
      kept: names in the files of tensors whose dtype the model does not choose.
      warnings: the checkpoint's, and what was left out or expanded.
    """

    model: CausalLM
    plan: Plan
    names: Names
    fused: Mapping[str, Fused]
    expanded: Mapping[str, QuantSpec]
    kept: Collection[str]
    warnings: tuple[str, ...]

    def fill(self, params: dict[str, Any]) -> CausalLM:
        """The model with the arrays of the plan's params tree, which is used up.

        Raises:
          ModelError: as `fill_model`.
        """
        divide_all(params, self.plan.specs, self.fused)
        expand_all(params, self.expanded, self.model.dtype)
        return fill_model(self.model, params, self.names)


def plan_model(plan: Plan, *, dtype: Any = None, backend: str | None = None) -> CausalLM:
    """Make the model of a checkpoint without its arrays, and check that every tensor has its place.

    Raises:
      CheckpointError, ModelError, InputError, BackendError: as `load_model`; of the weights only
        biases without a place and a tied head have been read by then.
    """
    return fit_model(plan, dtype=read_dtype(dtype), backend=backend).model


def fit_model(plan: Plan, *, dtype: Any, backend: str | None) -> Fit:
    """Make the model of a checkpoint without its arrays, and find what fills it.

    Raises:
      ModelError: if the architecture is not supported, if quantized modules have no place in it, or
        if tensors do not fit it.
      CheckpointError: if a file ends early, or a tied head differs from the embedding.
      BackendError: if there is no such backend, or it does not support this dtype.
    """
    family = find_family(plan.config)
    config, names = family.read(plan.config), family.names
    plan = drop_skipped(plan, config)
    config = settle_tie(config, plan, names)
    parts = [*plan.quantized, *plan.plain]
    check_prefix(parts, names, str(plan.folder))
    check_depth(parts, config.num_hidden_layers, str(plan.folder))
    if config.tie_word_embeddings:
        plan = drop_tied_head(plan, names)
    kinds = family.list_fused(config)
    fused = find_fused(plan, kinds)
    specs = divide_specs(plan.specs, fused)
    reordered = _list_reordered(plan, fused)
    has_head = config.tie_word_embeddings or not _are_headless(parts, names)
    options = {"dtype": dtype, "backend": backend, "has_head": has_head}
    model = _make_abstract(family, config, specs, reordered, **options)
    places = list_leaves(model)
    plan = drop_zero_biases(
        plan, lambda name: any(rename(part, names) in places for part in list_parts(name, fused))
    )
    expanded = list_expanded(specs, places, names)
    divided = describe_divided(plan.describe_leaves(), plan.specs, fused)
    described = describe_all(divided, expanded)
    leaves = rename_all(described, names)
    check_leaves(
        places, leaves, f"{plan.folder}: tensors", called=name_sources(places, leaves, kinds)
    )
    return Fit(
        model,
        plan,
        names,
        fused,
        expanded,
        kept=_list_kept(described, model.dtype, places, names),
        warnings=(
            *plan.warnings,
            *describe_expanded(plan, expanded),
            *describe_length(config),
            *(() if has_head else (_NO_HEAD,)),
        ),
    )


def _make_abstract(
    family: Family,
    config: LanguageConfig,
    specs: Mapping[str, QuantSpec],
    reordered: Collection[str],
    *,
    dtype: Any,
    backend: str | None,
    has_head: bool,
) -> CausalLM:
    """The model without its arrays; `dtype` None is the one that the checkpoint states.

    Specs, and which of their modules have reordered features, are by their names in the files.
    """
    dtype = dtype or config.dtype or "float32"
    check_backend(backend, dtype)
    make = functools.partial(family.open_class(), config, rename_all(specs, family.names))
    moved = {rename(path, family.names) for path in reordered}
    options = {"backend": backend, "reordered": moved, "has_head": has_head}
    return nnx.eval_shape(lambda: make(dtype=dtype, **options))


def _list_reordered(plan: Plan, fused: Mapping[str, Fused]) -> set[str]:
    """Paths of modules, after they are divided, whose input features were reordered."""
    moved = {p: m.spec for p, m in plan.quantized.items() if m.encoding.reordered}
    return set(divide_specs(moved, fused))


def _are_headless(parts: Collection[str], names: Names) -> bool:
    """Whether these are modules and tensors of a model that was saved without its head.

    Then nothing stands before the names of its layers. Otherwise a missing head is a fault.
    """
    is_bare = any(re.match(r"(embed_tokens|layers|norm)(\.|$)", part) for part in parts)
    return is_bare and not any(rename(part, names).startswith("lm_head") for part in parts)


def _list_kept(
    described: Mapping[str, jax.ShapeDtypeStruct],
    dtype: jnp.dtype,
    places: Mapping[str, Any],
    names: Names,
) -> set[str]:
    """Names of tensors that the model has in float32 whatever its dtype is."""
    wide = {path for path, leaf in places.items() if leaf.dtype == jnp.float32 != dtype}
    return {name for name in described if rename(name, names) in wide} if wide else set()
