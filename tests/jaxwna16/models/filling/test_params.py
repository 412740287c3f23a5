"""Loading by path: what fits, what is left out, and the list of what does not fit."""

from __future__ import annotations

import copy

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxwna16.errors import ModelError
from jaxwna16.models.filling.params import fill_model
from jaxwna16.models.llama.config import LlamaConfig
from jaxwna16.models.llama.definition import Llama
from pallas_kernels.format.spec import QuantSpec
from tests.jaxwna16.models.hf_models import forward, make_reference, nest_params, random_tokens


@pytest.fixture
def reference():
    return make_reference("llama")


def make_abstract(reference, specs=None, dtype=jnp.float32, **changes) -> Llama:
    config = LlamaConfig.from_dict({**reference.config.to_dict(), **changes})
    return nnx.eval_shape(lambda: Llama(config, specs, dtype=dtype))


def test_plain_weights_take_the_models_dtype(reference):
    model = fill_model(make_abstract(reference, dtype=jnp.bfloat16), nest_params(reference))
    assert {v.get_value().dtype for _, v in nnx.to_flat_state(nnx.state(model))} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_everything_that_does_not_fit_is_listed_at_once(reference):
    params = copy.deepcopy(nest_params(reference))
    del params["model"]["layers"]["1"]["mlp"]["up_proj"]
    params["model"]["norm"]["weight"] = np.zeros(65, np.float32)
    params["model"]["embed_tokens"]["weight"] = np.zeros((128, 64), np.int8)
    params["model"]["layers"]["0"]["self_attn"]["q_proj"]["bias"] = np.zeros(64, np.float32)
    params["visual"] = {"weight": np.zeros(3, np.float32)}
    with pytest.raises(ModelError) as raised:
        fill_model(make_abstract(reference), params)
    assert sorted(raised.value.reasons) == [
        "model.embed_tokens.weight: expected float32 [128, 64], found int8 [128, 64]",
        "model.layers.0.self_attn.q_proj.bias: expected nothing, found float32 [64]",
        "model.layers.1.mlp.up_proj.weight: expected float32 [96, 64], found nothing",
        "model.norm.weight: expected float32 [64], found float32 [65]",
        "visual.weight: expected nothing, found float32 [3]",
    ]


def test_an_untied_model_without_lm_head_is_refused(reference):
    params = nest_params(reference)
    del params["lm_head"]
    with pytest.raises(ModelError, match=r"lm_head.weight: expected float32 \[128, 64\]"):
        fill_model(make_abstract(reference), params)


def test_frequencies_of_old_checkpoints_are_left_out(reference):
    params = copy.deepcopy(nest_params(reference))
    params["model"]["layers"]["0"]["self_attn"]["rotary_emb"] = {
        "inv_freq": np.zeros(8, np.float32)
    }
    model = fill_model(make_abstract(reference), params)
    assert forward(model, jnp.asarray(random_tokens(1, 3))).shape == (1, 3, 128)


def test_a_tied_model_takes_no_head(reference):
    with pytest.raises(ModelError, match=r"lm_head.weight: expected nothing"):
        fill_model(make_abstract(reference, tie_word_embeddings=True), nest_params(reference))


def test_specs_that_fit_no_module_are_listed(reference):
    """That of an embedding fits: the model holds floats there."""

    def spec(out_features, in_features):
        return QuantSpec(
            bits=4,
            group_size=32,
            symmetric=True,
            in_features=in_features,
            out_features=out_features,
        )

    specs = {
        "model.embed_tokens": spec(128, 64),
        "model.layers.0.mlp.up_proj": spec(64, 96),
        "model.layers.7.mlp.up_proj": spec(96, 64),
    }
    with pytest.raises(ModelError) as raised:
        make_abstract(reference, specs)
    assert raised.value.reasons == (
        "model.layers.0.mlp.up_proj: expected [N, K] = [96, 64], found [64, 96]",
        "model.layers.7.mlp.up_proj: no linear of this model can be quantized there",
    )
