"""The kernels of a decode step, interpreted, compute what XLA's form of the same model computes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.families import find_family
from jaxwna16.models.parts.attention import LayerCache
from jaxwna16.models.parts.layers import Dense
from jaxwna16.models.parts.moe import FloatExperts
from pallas_kernels import QuantSpec
from tests.jaxprs import find_kernels
from tests.jaxwna16.models.family_rows import BASES, MODELS, ROWS

DISTINCT = [model_type for model_type, row in ROWS.items() if not row.is_repeated]
ALWAYS = ("qwen3_5_moe",)
"""All that a hybrid model has: both kinds of layers, experts, shared ones, and norms of heads."""
SLOTS, STEPS = 24, 8
UNIT = 2.0**-8
CLOSE = 24 * UNIT
"""Of vectors' lengths. The kernels round each of about 25 operations of a layer to 16 bits. XLA
leaves out most of these roundings (excess precision). Errors of 2^-8 / sqrt(3) that do not know of
each other grow as a root, to six units in four layers, and narrow random layers multiply them by up
to three (seen: 2.1 % before experts, 5.4 % behind them). A wrong position, head or norm gives more
than 0.3."""

run_hidden = jax.jit(CausalLM.hidden)


@functools.lru_cache(maxsize=1)
def make_models(model_type: str) -> dict[str, CausalLM]:
    """Backend -> the first model of a family's row, packed, with the same random weights."""
    row = ROWS[model_type]
    facts = {**row.sizes, **MODELS[BASES[model_type]][1]}
    facts = facts if row.nest is None else row.nest(facts)
    config = transformers.AutoConfig.for_model(model_type, **facts).to_dict()
    family = find_family(config)
    make, parsed = family.open_class(), family.read(config)
    plain = nnx.eval_shape(lambda: make(parsed, dtype=jnp.bfloat16))
    specs = dict(_list_specs(plain))

    def construct(backend: str) -> CausalLM:
        model = nnx.eval_shape(lambda: make(parsed, specs, dtype=jnp.bfloat16, backend=backend))
        rng = np.random.default_rng(0)
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            # scores that rounding decides would choose other experts; test_routing has the choice
            is_router = path[-2:] == ("gate", "weight")
            drawn = _draw(rng, path[-1], variable.get_value())
            # and scores of attention that hardly differ would show no wrong query
            drawn = drawn * 2 if path[-2] in ("q_norm", "k_norm") else drawn
            variable.set_value(jnp.zeros_like(drawn) if is_router else drawn)
        nnx.update(model, nnx.state(model))
        return model

    return {backend: construct(backend) for backend in ("xla", "triton")}


def _list_specs(model: CausalLM):
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if isinstance(module, Dense) and name != "lm_head" and module.weight.shape[0] > 1:
            yield name, _make_spec(module.weight.shape)
        elif isinstance(module, FloatExperts):
            yield f"{name}.w13", _make_spec(module.w13.weight.shape[1:])
            yield f"{name}.w2", _make_spec(module.w2.weight.shape[1:])


def _make_spec(shape) -> QuantSpec:
    n, k = shape
    group = 32 if k % 32 == 0 else 16
    return QuantSpec(bits=4, group_size=group, symmetric=False, in_features=k, out_features=n)


def _draw(rng: np.random.Generator, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Packed words and zero points of all values; products are about as large as what they take."""
    if name == "packed":
        return jnp.asarray(rng.integers(0, 2**16, leaf.shape), leaf.dtype)
    if name == "zero_point":
        return jnp.asarray(rng.integers(-8, 8, leaf.shape), leaf.dtype)
    if name == "scale":
        return jnp.asarray(rng.uniform(0.01, 0.02, leaf.shape), leaf.dtype)
    if leaf.ndim == 1:
        return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
    return jnp.asarray(rng.normal(size=leaf.shape) * leaf.shape[-1] ** -0.5, leaf.dtype)


@pytest.fixture(autouse=True)
def forget_programs():
    """Those of a family's kernels, interpreted, take hundreds of MB."""
    yield
    make_models.cache_clear()
    jax.clear_caches()


def step(model: CausalLM, cache, tokens, start, count):
    arrays = (jnp.asarray(x, jnp.int32) for x in (tokens, start, count))
    hidden, cache = run_hidden(model, *arrays, cache)
    return np.asarray(hidden, np.float32), cache


def assert_close(ours, theirs) -> None:
    """Vectors along the last axis."""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    error = np.linalg.norm(ours - theirs, axis=-1)
    assert np.all(error <= CLOSE * np.linalg.norm(theirs, axis=-1).max())


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(n, marks=[] if n in ALWAYS else [pytest.mark.thorough]) for n in DISTINCT],
)
def test_tokens_one_by_one_are_those_of_the_other_form(model_type):
    """Rows of unequal length from position 0 on, windows, and a row that rests for a step."""
    models = make_models(model_type)
    lengths, rng = np.array([STEPS, 3, 1]), np.random.default_rng(1)
    vocab = models["xla"].config.vocab_size
    prompts = rng.integers(0, vocab, (3, STEPS))
    caches = {}
    for name, model in models.items():
        cache = model.make_cache(3, SLOTS)
        # the second and third row begin with their first token at position 0, in the step's kernels
        first = np.where(np.arange(3) == 0, lengths, 0)
        _, caches[name] = step(model, cache, prompts, np.zeros(3), first)
    start = np.array([STEPS, 0, 0])
    for active in ([1, 1, 1], [1, 0, 1], [0, 1, 1]):
        before = jax.tree.map(np.asarray, caches["triton"])
        tokens, on = rng.integers(0, vocab, (3, 1)), np.array(active)
        outputs = {}
        for name, model in models.items():
            outputs[name], caches[name] = step(model, caches[name], tokens, start, on)
        assert_close(outputs["triton"][on > 0], outputs["xla"][on > 0])
        for ours, theirs, old in zip(caches["triton"], caches["xla"], before, strict=True):
            for one, other, was in zip(ours, theirs, old, strict=True):
                assert_close(one, other)
                assert_kept(np.asarray(one), was, start, on, isinstance(ours, LayerCache))
        start = start + on


def assert_kept(now: np.ndarray, was: np.ndarray, start, on, by_slot: bool) -> None:
    """Rows that rest are bit for bit what they were, and of a cache by slots all other slots."""
    rows = np.repeat(np.arange(3), len(now) // 3)
    np.testing.assert_array_equal(now[on[rows] == 0], was[on[rows] == 0])
    if by_slot:
        other = np.arange(SLOTS)[None, :] != start[rows][:, None]
        np.testing.assert_array_equal(now[other], was[other])


def test_a_layer_of_llama_is_nine_operations_of_which_eight_are_kernels_of_ours():
    """q/k/v, attention (and its combine), o and its end, gate and up, down and its end."""
    model = make_models("llama")["triton"]
    cache = model.make_cache(1, 4096)
    one = jnp.ones(1, jnp.int32)
    kernels = find_kernels(CausalLM.hidden, model, jnp.zeros((1, 1), jnp.int32), one, one, cache)
    assert len(kernels) == 8 * model.config.num_hidden_layers
