"""A step of the gated delta rule in one kernel, against float64 and against XLA's form."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formulas.delta_net import DeltaCache, DeltaNet
from pallas_kernels.triton.step.delta_rule import step_delta_rule
from pallas_kernels.xla.delta_rule import mix
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
def test_it_is_what_xla_does_for_the_layer_of_the_model(dtype, key_heads):
    """Both lie within the bound, so they are at most two bounds apart."""
    sizes = Sizes(3, 4, key_heads, 16, 8, 4, dtype)
    weights = oracle.draw_weights(sizes)
    net = DeltaNet(**jax.tree.map(jnp.asarray, weights), norm_eps=oracle.EPS, key_heads=key_heads)
    inputs, state = oracle.draw_cache(sizes)
    expected = oracle.exactly(state)
    cache = DeltaCache(jnp.asarray(inputs), jnp.asarray(state))
    for number in range(3):
        products = oracle.draw_products(sizes, seed=number)
        active = np.int32([1, number % 2, 1])
        tokens = [jnp.asarray(p.sums).swapaxes(0, 1) for p in products]
        theirs, cache = mix(tokens, net, cache, jnp.asarray(active))
        before = np.asarray(inputs)
        y, inputs, state = run(
            oracle.convert(products), inputs, state, active, weights, key_heads=key_heads
        )
        bounds, expected = oracle.step(sizes, products, weights, before, expected, active)
        np.testing.assert_array_equal(np.asarray(inputs), np.asarray(cache.inputs))
        assert_within(bounds, y, theirs[:, 0])
        # most bits are equal, too, since both round in the same places
        assert np.mean(np.asarray(y) == np.asarray(theirs[:, 0])) > (
            0.95 if dtype != "float32" else 0
        )
        assert_within(expected, state, cache.state)


def assert_within(bounds: Bounded, ours, theirs) -> None:
    ours, theirs = (np.asarray(a).astype(np.float64) for a in (ours, theirs))
    assert bounds.measure(ours) <= 1
    assert (np.abs(ours - theirs) <= 2 * bounds.error).all()
