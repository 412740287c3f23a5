"""Models with experts against transformers; `test_families` has their logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxwna16.errors import ModelError
from jaxwna16.models.filling.params import fill_model
from jaxwna16.models.llama.config import LlamaConfig
from jaxwna16.models.llama.definition import Llama
from pallas_kernels import QuantSpec
from tests.jaxwna16.models.family_rows import BASES, MODELS
from tests.jaxwna16.models.family_rows.deepseek import ROWS as OWN
from tests.jaxwna16.models.hf_models import (
    SPARSE,
    cast_weights,
    choose_experts,
    convert,
    make_reference,
    nest_params,
    random_tokens,
    record_routers,
)

FAMILY_OF_EACH_TYPE = [name for name in SPARSE if name in BASES.values()]
LATENT = [name for name, (model_type, _) in MODELS.items() if model_type in OWN]
"""Those with DeepSeek's attention."""


@pytest.mark.parametrize("family", [*SPARSE, *LATENT])
def test_the_chosen_experts_and_their_weights_are_those_of_transformers(family):
    reference = make_reference(family)
    model = convert(reference)
    seen = record_routers(reference, random_tokens(4, 32))
    assert list(seen) == [i for i, sparse in enumerate(model.config.moe.sparse) if sparse]
    for layer, router in seen.items():
        ids, weights = choose_experts(model, layer, router.hidden)
        np.testing.assert_array_equal(ids, router.ids)
        np.testing.assert_allclose(weights, router.weights, rtol=1e-4)
        assert len(np.unique(ids)) > ids.shape[1]  # not one choice for all tokens


@pytest.mark.parametrize("family", FAMILY_OF_EACH_TYPE)
def test_in_bfloat16_the_router_is_as_wide_as_that_of_transformers(family):
    reference = make_reference(family)
    model = convert(reference, dtype=jnp.bfloat16)
    cast_weights(reference, torch.bfloat16)
    (layer, router), *_ = record_routers(reference, random_tokens(4, 32)).items()
    gate = model.model.layers[layer].mlp.gate
    logits = gate(jnp.asarray(router.hidden, jnp.bfloat16))
    assert logits.dtype == (jnp.float32 if model.config.moe.wide_router else jnp.bfloat16)
    expected = router.logits.reshape(logits.shape)
    error = np.abs(np.asarray(logits, np.float32) - expected)
    # two sums in float32, each in an order of its own, and one step of the result's dtype
    weight = np.abs(np.asarray(gate.weight[...], np.float32))
    bound = 2 * weight.shape[1] * 2.0**-24 * (np.abs(router.hidden) @ weight.T)
    bound = bound.reshape(logits.shape) + jnp.finfo(logits.dtype).eps * np.abs(expected)
    assert (error <= bound).all()


def test_dense_and_sparse_layers_are_traced_once_each():
    family = "qwen2_moe, sparse and dense layers, renormalised"
    model = convert(make_reference(family, use_sliding_window=False))
    jaxpr = jax.make_jaxpr(Llama.__call__)(model, jnp.zeros((1, 4), jnp.int32))
    calls = [e for e in jaxpr.eqns if e.params.get("name") == "run_layer"]
    kinds = [id(e.params["jaxpr"]) for e in calls]
    assert model.config.moe.sparse == (False, True, False, False, False, True)
    assert len(set(kinds)) == 2
    assert [kind == kinds[1] for kind in kinds] == list(model.config.moe.sparse)


def test_a_correction_bias_stays_float32_and_is_no_parameter():
    reference = make_reference("dots1, grouped")
    model = convert(reference, dtype=jnp.bfloat16)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias[...].dtype == jnp.float32
    np.testing.assert_array_equal(
        bias[...], reference.model.layers[1].mlp.gate.e_score_correction_bias.numpy()
    )
    assert not any("correction" in str(p) for p in nnx.to_flat_state(nnx.state(model, nnx.Param)))


def make_spec(out_features: int, in_features: int) -> QuantSpec:
    return QuantSpec(
        bits=4, group_size=16, symmetric=True, in_features=in_features, out_features=out_features
    )


def test_specs_that_fit_no_experts_are_listed():
    """Those of routers, gates and one product alone fit: the model holds floats there."""
    config = LlamaConfig.from_dict(make_reference("qwen2_moe").config.to_dict())
    path = "model.layers"
    specs = {
        f"{path}.0.mlp.gate": make_spec(8, 64),
        f"{path}.0.mlp.shared_expert_gate": make_spec(1, 64),
        f"{path}.0.mlp.experts.w13": make_spec(96, 64),
        f"{path}.1.mlp.experts.w13": make_spec(48, 64),
        f"{path}.1.mlp.experts.w2": make_spec(64, 48),
        f"{path}.1.mlp.up_proj": make_spec(96, 64),
    }
    with pytest.raises(ModelError) as raised:
        nnx.eval_shape(lambda: Llama(config, specs, dtype=jnp.float32))
    assert raised.value.reasons == (
        f"{path}.1.mlp.experts.w13: expected [N, K] = [96, 64], found [48, 64]",
        f"{path}.1.mlp.up_proj: no linear of this model can be quantized there",
    )


def test_experts_that_are_missing_or_too_few_are_listed():
    reference = make_reference("mixtral")
    config = LlamaConfig.from_dict(reference.config.to_dict())
    abstract = nnx.eval_shape(lambda: Llama(config, dtype=jnp.float32))
    params = nest_params(reference)
    layers = params["model"]["layers"]
    del layers["0"]["mlp"]["experts"]["w2"]
    stack = layers["1"]["mlp"]["experts"]["w13"]
    stack["weight"] = stack["weight"][:7]
    with pytest.raises(ModelError) as raised:
        fill_model(abstract, params)
    path = "model.layers"
    assert sorted(raised.value.reasons) == [
        f"{path}.0.mlp.experts.w2.weight: expected float32 [8, 64, 96], found nothing",
        f"{path}.1.mlp.experts.w13.weight: expected float32 [8, 192, 64], "
        "found float32 [7, 192, 64]",
    ]
