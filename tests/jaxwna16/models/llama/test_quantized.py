"""What is compiled of packed linears in a Llama; `test_families` has the logits."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxwna16.errors import ModelError
from jaxwna16.generation.decoding import decode, make_options
from jaxwna16.generation.tokens import start_rows
from jaxwna16.layers.fused import project
from jaxwna16.models.filling.params import fill_model
from jaxwna16.models.llama.config import LlamaConfig
from jaxwna16.models.llama.definition import Llama
from pallas_kernels import QuantSpec, dequantize, quantize
from tests.jaxprs import find_kernels
from tests.jaxwna16.models.hf_models import (
    make_reference,
    nest_params,
)

KINDS = [
    ("llama", 4, 32, False, jnp.bfloat16),
    ("llama, tied, all biases", 8, -1, True, jnp.float16),
]


@functools.cache
def quantize_reference(family, bits, group_size, symmetric, scale_dtype):
    """Quantize every linear (`lm_head` too), give transformers the rounded weights; both models."""
    reference = make_reference(family)
    params = nest_params(reference)
    specs = {}
    for path, module in reference.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if path == "lm_head" and reference.config.tie_word_embeddings:
            continue
        spec = QuantSpec(
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            in_features=module.in_features,
            out_features=module.out_features,
        )
        node = functools.reduce(lambda tree, key: tree[key], path.split("."), params)
        weights = quantize(jnp.asarray(node.pop("weight")), spec, scale_dtype=scale_dtype)
        node.update(weights)
        specs[path] = spec
        rounded = np.array(dequantize(weights, spec, jnp.float32))
        module.weight = torch.nn.Parameter(torch.from_numpy(rounded))
    config = LlamaConfig.from_dict(reference.config.to_dict())
    abstract = nnx.eval_shape(lambda: Llama(config, specs, dtype=jnp.float32))
    return reference, fill_model(abstract, params)


def test_the_scales_keep_the_dtype_of_the_checkpoint():
    _, model = quantize_reference(*KINDS[1])
    assert model.model.layers[0].mlp.up_proj.scale.get_value().dtype == jnp.float16


def test_no_float_copy_of_a_weight_lives_through_the_decode_loop():
    _, model = quantize_reference(*KINDS[0])
    options = make_options(0.0, 0, 1.0, 0, ())
    progress, *_ = start_rows(model, [[1, 2, 3]], options, 16)
    program = decode.lower(model, progress, options, jnp.int32(1)).compile().as_text()
    carried = [line for line in program.splitlines() if re.search(r"\bwhile\(", line)]
    assert any("u16[" in line for line in carried)
    weight_shapes = {f"f32[{n},{k}]" for n, k in [(64, 64), (32, 64), (96, 64), (64, 96), (64, 32)]}
    assert not any(shape in line for line in carried for shape in weight_shapes)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1]], ids=["no biases", "all biases"])
def test_in_float32_the_fused_layers_are_bit_for_bit_the_linears_by_themselves(kind):
    _, model = quantize_reference(*kind)
    layer = model.model.layers[0]
    x = jax.random.normal(jax.random.key(1), (2, 3, 64))
    mlp, attention = layer.mlp, layer.self_attn
    apart = jax.jit(lambda x: mlp.down_proj(jax.nn.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))
    np.testing.assert_array_equal(jax.jit(lambda x: mlp(x))(x), apart(x))
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    together = jax.jit(lambda x: project(x, linears))(x)
    for y, expected in zip(together, jax.jit(lambda x: [f(x) for f in linears])(x), strict=True):
        np.testing.assert_array_equal(y, expected)


def test_a_layer_is_seven_kernels():
    """q/k/v, attention, o and its end, gate/up, down and its end; biases do not part gate and up."""
    reference, _ = quantize_reference(*KINDS[1])
    config = LlamaConfig.from_dict(reference.config.to_dict())
    specs = {
        path: QuantSpec(
            bits=4,
            group_size=32,
            symmetric=True,
            in_features=module.in_features,
            out_features=module.out_features,
        )
        for path, module in reference.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
    model = Llama(config, specs, dtype=jnp.bfloat16, backend="triton")
    kernels = find_kernels(Llama.__call__, model, jnp.zeros((1, 4), jnp.int32))
    assert len(kernels) == 7 * config.num_hidden_layers


def test_a_wrong_integer_dtype_is_an_error_of_ours():
    spec = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=64, out_features=96)
    reference = make_reference("llama")
    config = LlamaConfig.from_dict(reference.config.to_dict())
    path = "model.layers.0.mlp.up_proj"
    abstract = nnx.eval_shape(lambda: Llama(config, {path: spec}, dtype=jnp.float32))
    params = nest_params(reference)
    node = params["model"]["layers"]["0"]["mlp"]["up_proj"]
    node.clear()
    node.update(quantize(jax.random.normal(jax.random.key(0), (96, 64)), spec))
    node["packed"] = node["packed"].astype(jnp.int16)
    with pytest.raises(ModelError, match=r"up_proj.packed: expected uint16 .* found int16"):
        fill_model(abstract, params)
