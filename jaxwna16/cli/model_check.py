"""Whether the model of a planned checkpoint finds all its tensors, told from the headers."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxwna16.models.config import ModelConfig
from jaxwna16.models.llama import Llama
from jaxwna16.models.params import load_params
from loaders.plan import Plan
from pallas_kernels.weights import make_abstract


def check_model(plan: Plan) -> None:
    """Build the model of a plan without reading a weight.

    Raises:
      ModelError: if the architecture is not supported, or listing every tensor that is missing,
        unexpected or of another shape.
    """
    config = ModelConfig.from_dict(plan.config)
    specs = {path: module.spec for path, module in plan.quantized.items()}
    abstract = nnx.eval_shape(lambda: Llama(config, specs, dtype="float32"))
    jax.eval_shape(lambda params: nnx.state(load_params(abstract, params)), _list_leaves(plan))


def _list_leaves(plan: Plan) -> dict[str, Any]:
    """The params tree that the plan will become, as shapes and dtypes."""
    tree: dict[str, Any] = {}
    leaves = {i.name: jax.ShapeDtypeStruct(i.shape, i.dtype) for i in plan.plain.values()}
    for path, module in plan.quantized.items():
        bias = module.tensors.get("bias")
        scale = module.tensors["weight_scale"].dtype
        weights = make_abstract(module.spec, scale, None if bias is None else bias.dtype)
        leaves |= {f"{path}.{name}": leaf for name, leaf in weights.items()}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
