"""The two layers: one function, two shells."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxwna16
from jaxwna16 import QuantDense, QuantParam, QuantSpec, SpecError

N, K = 96, 160


def make_layer(*, symmetric=False, use_bias=True, group_size=32, scale_dtype=jnp.float32):
    """A spec and random weights in the tile layout, with a bias where asked for."""
    spec = QuantSpec(
        bits=4, group_size=group_size, symmetric=symmetric, in_features=K, out_features=N
    )
    rng = np.random.default_rng(7)
    w = jnp.asarray(rng.normal(size=(N, K)).astype(np.float32))
    weights = jaxwna16.quantize(w, spec, scale_dtype=scale_dtype)
    if use_bias:
        weights["bias"] = jnp.asarray(rng.normal(size=N).astype(np.float32))
    return spec, weights


def make_input(*shape):
    return jnp.asarray(np.random.default_rng(3).normal(size=shape).astype(np.float32))


def make_linen(spec, weights):
    return jaxwna16.linen.QuantDense(spec, use_bias="bias" in weights), {"params": weights}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linen_and_nnx_are_identical_and_equal_to_the_function(symmetric, use_bias, dtype):
    spec, weights = make_layer(symmetric=symmetric, use_bias=use_bias)
    x = make_input(2, 3, K).astype(dtype)
    layer, variables = make_linen(spec, weights)
    by_function = jaxwna16.quant_matmul(x, weights, spec)
    by_nnx = QuantDense.from_weights(weights, spec)(x)
    by_linen = layer.apply(variables, x)
    assert by_nnx.dtype == by_linen.dtype == dtype
    np.testing.assert_array_equal(np.asarray(by_nnx), np.asarray(by_function))
    np.testing.assert_array_equal(np.asarray(by_linen), np.asarray(by_function))


def test_both_layers_work_under_jit_vmap_and_grad():
    spec, weights = make_layer()
    x = make_input(5, K)
    layer, variables = make_linen(spec, weights)
    nnx_layer = QuantDense.from_weights(weights, spec)
    w = jaxwna16.dequantize(weights, spec, jnp.float32)
    for call in (nnx_layer, lambda x: layer.apply(variables, x)):
        expected = np.asarray(call(x))
        # Each output sums K products in some order: K roundings of at most |x| |w| each, on both
        # sides
        bound = 2 * K * 2.0**-24 * np.asarray(jnp.abs(x) @ jnp.abs(w).T).max()
        np.testing.assert_allclose(np.asarray(jax.jit(call)(x)), expected, rtol=0, atol=bound)
        np.testing.assert_allclose(np.asarray(jax.vmap(call)(x)), expected, rtol=0, atol=bound)
        slope = jax.grad(lambda x, call=call: call(x).sum())(x)
        column_sums = np.broadcast_to(np.asarray(w).sum(axis=0), x.shape)
        bound = 2 * N * 2.0**-24 * np.abs(np.asarray(w)).sum(axis=0).max()
        np.testing.assert_allclose(np.asarray(slope), column_sums, rtol=0, atol=bound)


def test_nnx_grad_and_optimizers_skip_the_integers():
    spec, weights = make_layer()
    layer, x = QuantDense.from_weights(weights, spec), make_input(4, K)
    gradients = nnx.grad(lambda layer: (layer(x) ** 2).mean())(layer)
    assert set(gradients) == {"scale", "bias"}
    optimizer = nnx.Optimizer(layer, optax.sgd(1e-4), wrt=nnx.Param)
    before = np.asarray(layer(x) ** 2).mean()
    optimizer.update(layer, gradients)
    assert np.asarray(layer(x) ** 2).mean() < before
    np.testing.assert_array_equal(layer.packed.get_value(), weights["packed"])
    np.testing.assert_array_equal(layer.zero_point.get_value(), weights["zero_point"])


def test_abstract_construction_makes_no_array():
    spec, _ = make_layer()
    layer = nnx.eval_shape(lambda: QuantDense(spec, use_bias=True))
    leaves = jax.tree.leaves(nnx.state(layer))
    assert len(leaves) == 4
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_a_new_layer_is_zero_and_init_of_linen_makes_the_same_tree():
    spec, weights = make_layer()
    layer, _ = make_linen(spec, weights)
    made = layer.init(jax.random.key(0), make_input(1, K))["params"]
    fresh = QuantDense(spec, use_bias=True)
    assert set(made) == set(weights)
    for name, leaf in made.items():
        twin = getattr(fresh, name).get_value()
        assert (leaf.shape, leaf.dtype) == (twin.shape, twin.dtype)
        assert leaf.shape == weights[name].shape
        assert not np.asarray(leaf).any()


def test_metadata_reaches_the_variables_of_the_kernel():
    spec, _ = make_layer()
    layer = QuantDense(spec, kernel_metadata={"note": "kernel"})
    assert isinstance(layer.packed, QuantParam)
    for leaf in (layer.packed, layer.scale, layer.zero_point):
        assert leaf.get_metadata()["note"] == "kernel"


def test_dtype_casts_the_input_and_says_so_in_the_output():
    spec, weights = make_layer(use_bias=False)
    x = make_input(2, K)
    layer = QuantDense.from_weights(weights, spec, dtype=jnp.bfloat16)
    linen_layer = jaxwna16.linen.QuantDense(spec, dtype=jnp.bfloat16)
    expected = jaxwna16.quant_matmul(x.astype(jnp.bfloat16), weights, spec)
    np.testing.assert_array_equal(layer(x), expected)
    np.testing.assert_array_equal(linen_layer.apply({"params": weights}, x), expected)


def test_weights_that_contradict_the_spec_are_refused_by_both():
    spec, weights = make_layer(symmetric=False)
    del weights["zero_point"]
    with pytest.raises(SpecError, match="zero_point is missing"):
        QuantDense.from_weights(weights, spec)
    layer, variables = make_linen(spec, weights)
    with pytest.raises(Exception, match="zero_point"):
        layer.apply(variables, make_input(1, K))


def test_a_stack_of_layers_scans():
    square = QuantSpec(bits=8, group_size=32, symmetric=True, in_features=K, out_features=K)
    stack = [
        jaxwna16.quantize(make_input(K, K) / (i + 10), square, scale_dtype=jnp.float32)
        for i in range(3)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack)
    step = lambda x, w: (jnp.tanh(jaxwna16.quant_matmul(x, w, square)), None)  # noqa: E731
    x = make_input(4, K)
    scanned, _ = jax.lax.scan(jax.remat(step), x, stacked)
    looped = x
    for leaves in stack:
        looped, _ = step(looped, leaves)
    # |w| <= 0.5 and |x| <= 4, so a product's rounding is below 2 K 2^-24 * K * 2; tanh has slope <=
    # 1 and a layer carries an error on at most K * 0.5 times
    bound = 2 * K * 2.0**-24 * K * 2
    np.testing.assert_allclose(scanned, looped, rtol=0, atol=bound)
    assert np.ptp(np.asarray(looped)) > 100 * bound
