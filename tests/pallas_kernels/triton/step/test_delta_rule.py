"""A step of the gated delta rule in one kernel, against float64 and against the model's layer."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxwna16.layers.fused import project
from jaxwna16.models.parts.decoder import Piece
from jaxwna16.models.parts.delta_rule import DeltaCache
from jaxwna16.models.parts.layers import Linears
from jaxwna16.models.qwen3_5.config import DeltaNetConfig
from jaxwna16.models.qwen3_5.definition import GatedDeltaNet
from pallas_kernels.triton.parts import Parts
from pallas_kernels.triton.step.delta_rule import step_delta_rule
from tests.executed.bounds import DTYPES, Bounded
from tests.pallas_kernels import delta_rule as oracle
from tests.pallas_kernels.delta_rule import Sizes

SIZES = [
    Sizes(3, 1, 1, 16, 16, 4, "float32"),
    Sizes(2, 4, 2, 8, 32, 3, "bfloat16", parts=3, bias=True),
    Sizes(2, 3, 1, 24, 40, 2, "float16", parts=2),
    Sizes(1, 8, 2, 32, 8, 4, "bfloat16"),
    Sizes(3, 3, 3, 16, 24, 4, "float32", bias=True),
    # the state of a head in several blocks
    Sizes(2, 1, 1, 256, 136, 4, "bfloat16", parts=2),
]


@functools.partial(jax.jit, static_argnames=("key_heads", "norm_eps"))
def run(products, inputs, state, active, weights, *, key_heads, norm_eps=oracle.EPS):
    return step_delta_rule(
        *products,
        **weights,
        inputs=inputs,
        state=state,
        active=active,
        key_heads=key_heads,
        norm_eps=norm_eps,
        interpret=True,
    )


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_several_steps_stay_within_their_bound_and_inactive_rows_stay_as_they_are(sizes):
    weights = oracle.draw_weights(sizes)
    inputs, state = oracle.draw_cache(sizes)
    expected = oracle.exactly(state)
    for number in range(3):
        products = oracle.draw_products(sizes, seed=number)
        active = (np.arange(sizes.rows) + number) % 3 > 0
        active = active.astype(np.int32)
        before = state
        y, moved, state = map(
            np.asarray,
            run(
                oracle.convert(products), inputs, state, active, weights, key_heads=sizes.key_heads
            ),
        )
        y_expected, expected = oracle.step(sizes, products, weights, inputs, expected, active)
        assert (y.dtype, moved.dtype) == (DTYPES[sizes.dtype],) * 2
        assert y_expected.measure(y) <= 1
        assert expected.measure(state) <= 1
        inputs = oracle.shift_inputs(products[0], inputs, active)
        np.testing.assert_array_equal(moved.view(np.uint8), inputs.view(np.uint8))
        off = active == 0
        np.testing.assert_array_equal(state[off].view(np.uint8), before[off].view(np.uint8))


def test_the_bound_is_narrow():
    """Of float32 a few thousand units, of 16 bits a few: a wrong rounding would show."""
    for sizes, widest in ((SIZES[0], 1e-4), (SIZES[1], 0.3)):
        inputs, state = oracle.draw_cache(sizes)
        y, state = oracle.step(
            sizes,
            oracle.draw_products(sizes, 0),
            oracle.draw_weights(sizes),
            inputs,
            oracle.exactly(state),
            np.ones(sizes.rows),
        )
        assert np.median(y.error) < widest * np.median(np.abs(y.value))
        assert np.median(state.error) < widest * np.median(np.abs(state.value))


def test_what_an_inactive_row_holds_does_not_matter():
    sizes = SIZES[0]
    products, weights = oracle.draw_products(sizes, 0), oracle.draw_weights(sizes)
    inputs, state = oracle.draw_cache(sizes)
    state[1], inputs[1] = np.nan, np.inf
    y, moved, kept = run(
        oracle.convert(products), inputs, state, np.int32([1, 0, 1]), weights, key_heads=1
    )
    assert not np.asarray(y)[1].any()
    assert np.isnan(np.asarray(kept)[1]).all()
    assert np.isinf(np.asarray(moved)[1]).all()
    assert np.isfinite(np.asarray(y)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_it_is_what_the_layer_of_the_model_does(dtype, key_heads):
    """Both lie within the bound, so they are at most two bounds apart."""
    sizes = Sizes(3, 4, key_heads, 16, 8, 4, dtype)
    layer, weights = make_layer(sizes)
    inputs, state = oracle.draw_cache(sizes)
    expected = oracle.exactly(state)
    cache = DeltaCache(jnp.asarray(inputs), jnp.asarray(state))
    rng = np.random.default_rng(5)
    for number in range(3):
        x = jnp.asarray(rng.standard_normal((3, 1, 32)).astype(DTYPES[dtype]))
        active = np.int32([1, number % 2, 1])
        none = jnp.zeros(0)
        theirs, cache = layer(x, Piece((none, none), none, none, jnp.asarray(active)), cache)
        linears = (layer.in_proj_qkv, layer.in_proj_z, layer.in_proj_b, layer.in_proj_a)
        products = [Parts(p[:, 0][None]) for p in project(x, linears)]
        before = inputs
        y, inputs, state = run(products, inputs, state, active, weights, key_heads=key_heads)
        bounds, expected = oracle.step(
            sizes, products, weights, np.asarray(before), expected, active
        )
        np.testing.assert_array_equal(np.asarray(inputs), np.asarray(cache.inputs))
        assert_within(bounds, y, theirs[:, 0])
        assert_within(expected, state, cache.state)


def assert_within(bounds: Bounded, ours, theirs) -> None:
    ours, theirs = (np.asarray(a).astype(np.float64) for a in (ours, theirs))
    assert bounds.measure(ours) <= 1
    assert (np.abs(ours - theirs) <= 2 * bounds.error).all()


def make_layer(sizes: Sizes) -> tuple[GatedDeltaNet, dict[str, np.ndarray]]:
    """A layer of 32 features with drawn weights, whose last product is the identity."""
    delta = DeltaNetConfig(
        key_heads=sizes.key_heads,
        value_heads=sizes.heads,
        key_dim=sizes.key_dim,
        value_dim=sizes.value_dim,
        width=sizes.width,
    )
    config = types.SimpleNamespace(hidden_size=32, delta=delta, rms_norm_eps=oracle.EPS)
    dtype = jnp.dtype(sizes.dtype)
    layer = GatedDeltaNet(config, Linears({}, dtype, None), "layer")
    weights, rng = oracle.draw_weights(sizes), np.random.default_rng(7)
    for linear in (layer.in_proj_qkv, layer.in_proj_z, layer.in_proj_b, layer.in_proj_a):
        shape = linear.weight[...].shape
        drawn = rng.standard_normal(shape).astype(np.float32) / np.float32(32**0.5)
        linear.weight.set_value(jnp.asarray(drawn).astype(dtype))
    layer.out_proj.weight.set_value(jnp.eye(32, dtype=dtype))
    layer.conv1d.weight.set_value(jnp.asarray(weights["conv_weight"])[:, None])
    layer.A_log.set_value(jnp.asarray(weights["A_log"]))
    layer.dt_bias.set_value(jnp.asarray(weights["dt_bias"]))
    layer.norm.weight.set_value(jnp.asarray(weights["norm_weight"]))
    assert isinstance(layer, nnx.Module)
    return layer, weights
