"""Other projects' kernels for the experts of a Mixture-of-Experts.

The tokens of each expert are found beforehand, and that is not timed, to the peers' advantage.
Peers in PyTorch use its own kernels for the activation and the sum over the experts.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxwna16.bench.cases import Inputs, Weight, draw_floats
from jaxwna16.bench.dense_peers import make_humming_layer
from jaxwna16.bench.engines import AnyCase, Engine
from jaxwna16.bench.moe_cases import MoeCase
from jaxwna16.bench.peer_sources import ExpertSource, Product, UnservedError


def build_grouped(source: ExpertSource, dtype: Any) -> Product:
    """PyTorch's grouped product in 16-bit floats, of rows that are sorted by expert."""
    torch = source.torch
    functional = torch.nn.functional
    multiply_groups = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    if dtype != torch.bfloat16:
        raise UnservedError("bfloat16 only")
    weight = tuple(source.expand(place, dtype) for place in (0, 1))

    def prepare(inputs):
        x, ids, weights = inputs
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        ends = flat.bincount(minlength=len(source.experts)).cumsum(0).to(torch.int32)
        return x, order // ids.shape[1], order.argsort(), ends, weights

    def multiply(inputs, weight):
        x, tokens, back, ends, weights = inputs
        h = multiply_groups(x[tokens], weight[0].transpose(1, 2), offs=ends)
        h = _activate(functional, h)
        y = multiply_groups(h, weight[1].transpose(1, 2), offs=ends)
        return _add(y[back], weights)

    return Product(multiply, weight, prepare)


def build_humming(source: ExpertSource, dtype: Any) -> Product:
    """Humming's CUDA kernels that take rows by their index, as vLLM uses them by default.

    Source: vllm `HummingIndexedExperts` and humming `testing/data.py`, `generate_moe_tensors`.
    """
    torch, tuner = source.torch, importlib.import_module("humming.tune")
    specs = [part.spec for part in source.experts[0]]
    layers = tuple(
        make_humming_layer(spec, source.expand(place, dtype)) for place, spec in enumerate(specs)
    )
    tunings = [
        tuner.get_heuristics_config(layer_config=layer.humming_config, gemm_type="indexed")
        for layer in layers
    ]
    texts = [json.dumps(tuning) for tuning in tunings]
    compute = json.dumps({"gemm_type": "indexed"})

    def prepare(inputs):
        x, ids, weights = inputs
        total = ids.numel()
        fitting = [config for least, most, config in tunings[0] if least < total <= most]
        rows = group_rows(ids.cpu().numpy(), len(source.experts), fitting[0]["block_shape"][0])
        arrays = [torch.from_numpy(a).to(x.device) for a in rows]
        names = ("sorted_ids", "expert_ids", "num_tokens_padded")
        return x, weights, dict(zip(names, arrays, strict=True))

    def multiply(inputs, layers):
        x, weights, rows = inputs
        facts = {**rows, "compute_config": compute, "valid_shape_m": weights.numel()}
        h = layers[0](x, top_k=weights.shape[1], tuning_config=texts[0], **facts)
        h = _activate(torch.nn.functional, h)
        return _add(layers[1](h, top_k=1, tuning_config=texts[1], **facts), weights)

    return Product(multiply, layers, prepare)


def group_rows(ids: np.ndarray, experts: int, block: int) -> tuple[np.ndarray, ...]:
    """The pairs of each expert, padded to whole blocks with one past the last pair.

    Returns:
      int32: pairs, the expert of each block, and how many pairs there are with the padding.
    """
    flat = ids.reshape(-1)
    blocks, owners = [], []
    for expert in range(experts):
        mine = np.flatnonzero(flat == expert)
        count = -(-mine.size // block)
        blocks.append(np.pad(mine, (0, count * block - mine.size), constant_values=flat.size))
        owners += [expert] * count
    pairs = np.concatenate(blocks).astype(np.int32)
    return pairs, np.array(owners, np.int32), np.array(pairs.size, np.int32)


def _activate(functional: Any, h: Any) -> Any:
    gate, up = h.chunk(2, dim=1)
    return functional.silu(gate) * up


def _add(y: Any, weights: Any) -> Any:
    """The weighed sum over the experts of each token, from rows in the order of pairs."""
    parts = y.view(*weights.shape, -1).float() * weights[:, :, None]
    return parts.sum(1).to(y.dtype)


class RaggedDot(Engine):
    """Tokamax' `ragged_dot` on bfloat16 weights, never the implementation that XLA has."""

    def describe_weight(self, case: AnyCase) -> Weight:
        """Stacks [E, K, N], as it wants them."""
        return tuple(
            jax.ShapeDtypeStruct((leaf.shape[0], leaf.shape[2], leaf.shape[1]), leaf.dtype)
            for leaf in case.describe_weight(packed=False)
        )

    def draw_weight(self, case: AnyCase, key: jax.Array) -> Weight:
        assert isinstance(case, MoeCase)

        def draw_expert(key: jax.Array) -> Weight:
            keys = jax.random.split(key)
            return tuple(
                draw_floats(keys[i], spec, case.dtype).T for i, spec in enumerate(case.specs)
            )

        return lax.map(draw_expert, jax.random.split(key, case.experts.experts))

    def draw_inputs(self, case: AnyCase, number: int) -> Inputs:
        assert isinstance(case, MoeCase)
        x, _, weights = case.draw_inputs(number)
        flat = case.draw_choices(number)[0].reshape(-1)
        order = flat.argsort(kind="stable").astype(np.int32)
        sizes = np.bincount(flat, minlength=case.experts.experts).astype(np.int32)
        arrays = (order // case.experts.top_k, order.argsort().astype(np.int32), sizes)
        return (x, *(jnp.asarray(a) for a in arrays), weights)

    def compute(self, case: AnyCase, inputs: Inputs, weight: Weight) -> jax.Array:
        tokamax: Any = importlib.import_module("tokamax")
        x, tokens, back, sizes, weights = inputs

        def multiply(rows: jax.Array, stack: jax.Array) -> jax.Array:
            facts = {"group_sizes": sizes, "preferred_element_type": x.dtype}
            return tokamax.ragged_dot(rows, stack, implementation=("mosaic", "triton"), **facts)

        gate, up = jnp.split(multiply(x[tokens], weight[0]).astype(jnp.float32), 2, axis=1)
        h = (jax.nn.silu(gate) * up).astype(x.dtype)
        parts = multiply(h, weight[1])[back].astype(jnp.float32)
        total = jnp.sum(parts.reshape(*weights.shape, -1) * weights[:, :, None], axis=1)
        return total.astype(x.dtype)

    def compute_exactly(self, case: AnyCase, weight: Weight) -> jax.Array:
        """The result for the first inputs in float32, expert by expert."""
        x, ids, weights = case.draw_inputs(0)
        turned = tuple(stack.swapaxes(1, 2) for stack in weight)
        facts = {"packed": False, "backend": None}
        return case.compute((x.astype(jnp.float32), ids, weights), turned, **facts)
