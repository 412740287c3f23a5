"""What a decoder tells its layers: each its own rope or none, whose tables are made once a step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.families import parse_config
from jaxwna16.models.llama.definition import LlamaDecoder
from tests.jaxwna16.models.family_rows import SMALL

CONFIG = parse_config({"model_type": "llama", **SMALL, "num_hidden_layers": 6})
ONE, OTHER = CONFIG.rope, dataclasses.replace(CONFIG.rope, theta=5e5)


class Turning(LlamaDecoder):
    """Layers with one rope, with another one, and with none."""

    def list_ropes(self):
        return [ONE, OTHER, None, ONE, OTHER, None]


def trace(decoder) -> list:
    """The operations of a step, of which a layer is one."""
    model = nnx.eval_shape(lambda: CausalLM(decoder, CONFIG, dtype=jnp.float32))
    tokens, places = jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32)
    cache = jax.eval_shape(lambda: model.make_cache(2, 8))
    return jax.make_jaxpr(CausalLM.hidden)(model, tokens, places, places, cache).eqns


@pytest.mark.parametrize(
    ("decoder", "tables", "programs"),
    [(LlamaDecoder, 1, [0] * 6), (Turning, 2, [0, 0, 1, 0, 0, 1])],
)
def test_a_rope_has_one_table_and_layers_of_one_shape_are_one_program(decoder, tables, programs):
    equations = trace(decoder)
    assert sum(equation.primitive.name == "cos" for equation in equations) == tables
    layers = [e.params["jaxpr"] for e in equations if e.params.get("name") == "run_layer"]
    first = list(dict.fromkeys(map(id, layers)))
    assert [first.index(id(layer)) for layer in layers] == programs
