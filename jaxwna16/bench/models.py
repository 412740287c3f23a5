"""Whole models for the bench: what of them is packed, and random weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.families import find_family
from jaxwna16.models.parts.layers import Dense
from jaxwna16.models.parts.moe import FloatExperts
from pallas_kernels.format.spec import QuantSpec


def describe_model(
    config: Mapping[str, Any],
    *,
    ignore: Iterable[str] = ("lm_head",),
    group_size: int = 128,
    dtype: str = "bfloat16",
    backend: str | None = None,
) -> CausalLM:
    """A model of shapes whose linears and experts are packed with 4 bits, asymmetric.

    Args:
      config: a config.json.
      ignore: modules that stay plain: paths, or patterns that begin with "re:".
      group_size: input features that share a scale.
      dtype, backend: as `CausalLM`.
    """
    family = find_family(config)
    parsed, make = family.read(config), family.open_class()
    plain = nnx.eval_shape(lambda: make(parsed, {}, dtype=dtype))
    specs = dict(_list_specs(plain, ignore, group_size))
    return nnx.eval_shape(lambda: make(parsed, specs, dtype=dtype, backend=backend))


def _list_specs(
    model: CausalLM, ignore: Iterable[str], group_size: int
) -> Iterator[tuple[str, QuantSpec]]:
    patterns = [
        re.compile(p.removeprefix("re:") if p.startswith("re:") else re.escape(p) + "$")
        for p in ignore
    ]

    def make_spec(n: int, k: int) -> QuantSpec:
        return QuantSpec(
            bits=4, group_size=group_size, symmetric=False, in_features=k, out_features=n
        )

    for keys, module in nnx.iter_modules(model):
        path = ".".join(map(str, keys))
        if any(pattern.match(path) for pattern in patterns):
            continue
        if isinstance(module, Dense):
            yield path, make_spec(*module.weight.shape)
        elif isinstance(module, FloatExperts):
            yield f"{path}.w13", make_spec(*module.w13.weight.shape[1:])
            yield f"{path}.w2", make_spec(*module.w2.weight.shape[1:])


def draw_weights(model: CausalLM) -> CausalLM:
    """The same model with random weights on the default device."""
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    keys = iter(jax.random.split(jax.random.key(0), len(flat)))
    filled = [
        (path, variable.replace(_draw(next(keys), variable.get_value(), str(path[-1]))))
        for path, variable in flat
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _draw(key: jax.Array, leaf: Any, name: str) -> jax.Array:
    """Random values of a leaf; of floats so many sizes that activations stay near one."""
    if jnp.issubdtype(leaf.dtype, jnp.unsignedinteger):
        return jax.random.bits(key, leaf.shape, leaf.dtype)
    if leaf.dtype == jnp.int8:
        return jax.random.randint(key, leaf.shape, -8, 8, jnp.int8)
    if name == "scale":
        return jax.random.uniform(key, leaf.shape, leaf.dtype, 0.001, 0.004)
    if len(leaf.shape) < 2:
        return jnp.ones(leaf.shape, leaf.dtype)
    return jnp.asarray(0.02, leaf.dtype) * jax.random.normal(key, leaf.shape, leaf.dtype)
