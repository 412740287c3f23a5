"""A piece of the prompts on a GPU has no scores and no mask in memory, whatever the family."""

from __future__ import annotations

import re
import warnings

import jax
import jax.numpy as jnp
import pytest
import transformers
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh

from jaxwna16.generation.decoding import make_options, make_progress, prefill
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.families import find_family
from tests.jaxwna16.models.family_rows import BASES, MODELS, ROWS, Row

BATCH, STEPS, SLOTS = 2, 88, 200
"""No size of a small model is one of the last two, and a chunk of the delta rule is shorter."""
NO_KERNEL = ("deepseek_v3",)
"""Latent attention is XLA's, and has scores for a block of slots."""
DISTINCT = [
    model_type
    for model_type, row in ROWS.items()
    if not row.is_repeated and model_type not in NO_KERNEL
]
ALWAYS = ("cohere2", "gemma2", "llama", "minimax_m2", "ministral3", "qwen3_5_moe")
"""All kinds of attention: windows, softcaps, scales, norms, gates, and delta nets."""


def _make_abstract(row: Row, model_type: str) -> CausalLM:
    """The first model of a row, in bfloat16, without weights."""
    facts = {**row.sizes, **MODELS[BASES[model_type]][1]}
    facts = facts if row.nest is None else row.nest(facts)
    config = transformers.AutoConfig.for_model(model_type, **facts).to_dict()
    family = find_family(config)
    make, parsed = family.open_class(), family.read(config)
    return nnx.eval_shape(lambda: make(parsed, dtype=jnp.bfloat16))


def _list_shapes(traced, platform: str) -> set[tuple[int, ...]]:
    """Of all arrays in what is lowered."""
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    return {tuple(map(int, shape.split("x")[:-1])) for shape in found}


def _trace(model: CausalLM):
    """A piece with a cache, and whole rows without one."""
    tokens = jax.ShapeDtypeStruct((BATCH, STEPS), jnp.int32)
    bound = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    facts = {"slots": SLOTS, "width": 16, "likeliest": None}
    progress = jax.eval_shape(lambda lengths: make_progress(model, lengths, **facts), bound)
    options = jax.eval_shape(lambda: make_options(0.0, 0, 1.0, 0, ()))
    yield prefill.trace(model, tokens, bound, bound, progress, options), SLOTS
    yield jax.jit(CausalLM.__call__).trace(model, tokens), STEPS


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(n, marks=[] if n in ALWAYS else [pytest.mark.thorough]) for n in DISTINCT],
)
def test_no_array_has_a_number_for_each_query_and_slot(model_type):
    gpu = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100", 132, "cuda"))
    with jax.sharding.use_abstract_mesh(gpu), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Triton.*", DeprecationWarning)
        for traced, slots in _trace(_make_abstract(ROWS[model_type], model_type)):

            def are_scores(shape: tuple[int, ...], slots: int = slots) -> bool:
                """Queries may be folded with heads, in front of slots."""
                return shape[-1:] == (slots,) and any(n % STEPS == 0 for n in shape[:-1])

            assert not list(filter(are_scores, _list_shapes(traced, "cuda")))
            assert list(filter(are_scores, _list_shapes(traced, "cpu")))
