"""The model that a plan is for, without its arrays, and the parts of the plan that fill it."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from jaxwna16.dtypes import read_dtype
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.families import find_family
from jaxwna16.models.filling.expanded import describe_expanded, describe_leaves, list_expanded
from jaxwna16.models.filling.names import check_prefix, rename, rename_all
from jaxwna16.models.filling.params import check_leaves, list_leaves
from jaxwna16.models.filling.skipped import drop_skipped
from jaxwna16.models.filling.tied_head import drop_tied_head
from jaxwna16.models.filling.zero_biases import drop_zero_biases
from loaders.plan import Plan
from pallas_kernels.backends import check_backend
from pallas_kernels.format.spec import QuantSpec


def plan_model(plan: Plan, *, dtype: Any = None, backend: str | None = None) -> CausalLM:
    """Make the model of a checkpoint without its arrays, and check that every tensor has its place.

    Raises:
      CheckpointError, ModelError, InputError, BackendError: as `load_model`; of the weights only
        biases without a place and a tied head have been read by then.
    """
    return fit_model(plan, dtype=read_dtype(dtype), backend=backend)[0]


def fit_model(
    plan: Plan, *, dtype: Any, backend: str | None
) -> tuple[CausalLM, Plan, dict[str, QuantSpec]]:
    """The model of a checkpoint without its arrays, and the plan of the parts that are for it.

    The third result has the weights that are packed in the files and floats in the model, by path
    (`list_expanded`). The plan's warnings say what was left out.

    Raises:
      ModelError: if the architecture is not supported, if quantized modules have no place in it, or
        if tensors do not fit it.
      CheckpointError: if a file ends early, or a tied head differs from the embedding.
      BackendError: if there is no such backend, or it does not support this dtype.
    """
    family = find_family(plan.config)
    config = family.read(plan.config)
    plan = drop_skipped(plan, config)
    check_prefix([*plan.quantized, *plan.plain], family.names, str(plan.folder))
    if config.tie_word_embeddings:
        plan = drop_tied_head(plan, family.names)
    reordered = {path for path, module in plan.quantized.items() if module.encoding.reordered}
    specs = rename_all(plan.specs, family.names)
    dtype = dtype or config.dtype or "float32"
    check_backend(backend, dtype)
    facts = {
        "dtype": dtype,
        "backend": backend,
        "reordered": {rename(path, family.names) for path in reordered},
    }
    make = family.open_class()
    model = nnx.eval_shape(lambda: make(config, specs, **facts))
    places = list_leaves(model)
    plan = drop_zero_biases(plan, lambda name: rename(name, family.names) in places)
    expanded = list_expanded(plan, places, family.names)
    found = rename_all(describe_leaves(plan, expanded), family.names)
    check_leaves(model, found, f"{plan.folder}: tensors")
    warnings = (*plan.warnings, *describe_expanded(plan, expanded))
    return model, dataclasses.replace(plan, warnings=warnings), expanded
