"""Fused layers under jit, vmap, scan, remat, grad and eval_shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxwna16 import QuantDense, QuantSpec, gated, project
from tests.jaxwna16.layers.dense_layers import (
    F32,
    K,
    assert_within,
    make_input,
    make_layer,
    make_three,
    multiply_exactly,
    silu,
    weight_of,
)


def combine(x: jax.Array, layers) -> jax.Array:
    q, k, v = project(x, layers)
    return jnp.concatenate([q, k, v, gated(x, *layers[:2])], axis=-1)


def combine_apart(x: jax.Array, layers) -> jax.Array:
    q, k, v = (layer(x) for layer in layers)
    return jnp.concatenate([q, k, v, jax.nn.silu(q) * k], axis=-1)


def bound_of(layers, x) -> np.ndarray:
    """What two orders of summing can differ by in the result of `combine`, in float32."""
    (q, q_error), (k, k_error), (_, v_error) = (multiply_exactly(layer, x) for layer in layers)
    product = 1.1 * q_error * (np.abs(k) + k_error) + np.abs(silu(q)) * k_error
    product += 16 * F32 * (np.abs(q * k))
    return 2 * np.concatenate([q_error, k_error, v_error, product], axis=-1)


def test_jit_and_vmap_over_rows():
    layers, x = make_three(), make_input(4, 2, K)
    expected, bound = combine_apart(x, layers), bound_of(layers, x)
    assert_within(jax.jit(combine)(x, layers), expected, bound)
    assert_within(jax.jit(jax.vmap(combine, in_axes=(0, None)))(x, layers), expected, bound)


def test_vmap_and_scan_over_stacked_layers():
    stacks = [make_three(), [make_layer(seed=i, bias=True) for i in (5, 6)] + make_three()[2:]]
    graph, _ = nnx.split(stacks[0])
    states = [nnx.split(layers)[1] for layers in stacks]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    x = make_input(3, K)
    run = lambda x, state: combine(x, nnx.merge(graph, state))  # noqa: E731
    mapped = jax.jit(jax.vmap(run, in_axes=(None, 0)))(x, stacked)
    _, scanned = jax.jit(lambda x: jax.lax.scan(lambda x, s: (x, run(x, s)), x, stacked))(x)
    for layers, by_vmap, by_scan in zip(stacks, mapped, scanned, strict=True):
        expected, bound = combine_apart(x, layers), bound_of(layers, x)
        assert_within(by_vmap, expected, bound)
        assert_within(by_scan, expected, bound)


@pytest.mark.parametrize("remat", [False, True])
def test_the_gradient_with_respect_to_x_is_that_of_the_layers_apart(remat):
    """d/dx sum(c * y) = c W: a sum over all features in another order on each side."""
    layers, x = make_three(), make_input(3, K)
    c = make_input(3, 96 + 96 + 32)
    run = jax.checkpoint(project) if remat else project
    loss = lambda x: (jnp.concatenate(run(x, layers), axis=-1) * c).sum()  # noqa: E731
    w = np.concatenate([weight_of(layer) for layer in layers])
    wide = np.asarray(c, np.float64)
    gamma = (len(w) + 64) * F32
    assert_within(jax.jit(jax.grad(loss))(x), wide @ w, gamma * (np.abs(wide) @ np.abs(w)))


def test_the_gradient_of_gated_is_that_of_the_layers_apart():
    """For y = silu(g) u and c = 1, dx = (silu'(g) u) Wg + silu(g) Wu.

    Errors e_g, e_u of the products pass through silu' (|silu''| <= 0.5) and the second sums.
    """
    gate, up, _ = make_three()
    x = make_input(3, K)
    (g, g_error), (u, u_error) = multiply_exactly(gate, x), multiply_exactly(up, x)
    sigmoid = 1 / (1 + np.exp(-g))
    slope = sigmoid * (1 + g * (1 - sigmoid))
    wg, wu = weight_of(gate), weight_of(up)
    expected = (slope * u) @ wg + silu(g) @ wu
    left = 0.5 * g_error * (np.abs(u) + u_error) + 1.1 * u_error
    left += 16 * F32 * np.abs(u) * (1 + np.abs(g))
    right = 1.1 * g_error + 8 * F32 * np.abs(g)
    bound = left @ np.abs(wg) + right @ np.abs(wu)
    gamma = (2 * len(wg) + 64) * F32
    bound += gamma * (np.abs(slope * u) @ np.abs(wg) + np.abs(silu(g)) @ np.abs(wu))
    found = jax.jit(jax.grad(lambda x: gated(x, gate, up).sum()))(x)
    assert_within(found, expected, 1.001 * bound)


def test_abstract_layers_have_abstract_results():
    spec = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=K, out_features=96)
    make = lambda: nnx.List([QuantDense(spec, act_order=True) for _ in range(3)])  # noqa: E731
    layers = nnx.eval_shape(make)
    x = jax.ShapeDtypeStruct((5, K), jnp.bfloat16)
    found = jax.eval_shape(combine, x, layers)
    assert (found.shape, found.dtype) == ((5, 4 * 96), jnp.bfloat16)
