"""The two layers: one function, two shells."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxwna16
from jaxwna16 import BackendError, QuantDense, QuantParam, QuantSpec, SpecError
from tests.grids import sample
from tests.jaxprs import find_kernels

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


def make_linen(spec, weights, **options):
    has = {"use_bias": "bias" in weights, "act_order": "perm" in weights}
    return jaxwna16.linen.QuantDense(spec, **has, **options), {"params": weights}


def make_reordered():
    """A spec, W [N, K] of integers, and weights that hold it with its input features reordered.

    Each group spans -8 .. 7, so its scale is 1, its zero point 0, and nothing is rounded.
    """
    rng = np.random.default_rng(5)
    spec = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=K, out_features=N)
    reordered = rng.integers(-8, 8, (N, K)).astype(np.float32)
    reordered[:, ::32], reordered[:, 1::32] = -8, 7
    perm = rng.permutation(K).astype(np.int32)
    w = np.empty_like(reordered)
    w[:, perm] = reordered
    weights = jaxwna16.quantize(jnp.asarray(reordered), spec)
    return spec, w, {**weights, "perm": jnp.asarray(perm)}


@pytest.mark.parametrize(
    ("dtype", "use_bias", "symmetric"),
    sample(itertools.product((jnp.float32, jnp.bfloat16), (True, False), (True, False)), every=3),
)
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
        np.testing.assert_allclose(
            np.asarray(jax.jit(jax.vmap(call))(x)), expected, rtol=0, atol=bound
        )
        slope = jax.jit(jax.grad(lambda x, call=call: call(x).sum()))(x)
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
    layer = nnx.eval_shape(lambda: QuantDense(spec, use_bias=True, act_order=True))
    leaves = jax.tree.leaves(nnx.state(layer))
    assert len(leaves) == 5
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_a_new_layer_is_zero_and_init_of_linen_makes_the_same_tree():
    spec, weights = make_layer()
    layer, _ = make_linen(spec, weights)
    made = jax.jit(layer.init)(jax.random.key(0), make_input(1, K))["params"]
    fresh = QuantDense(spec, use_bias=True)
    assert set(made) == set(weights)
    for name, leaf in made.items():
        twin = getattr(fresh, name).get_value()
        assert (leaf.shape, leaf.dtype) == (twin.shape, twin.dtype)
        assert leaf.shape == weights[name].shape
        assert not np.asarray(leaf).any()


def test_metadata_reaches_the_variables_of_the_kernel():
    spec, _ = make_layer()
    layer = QuantDense(spec, act_order=True, kernel_metadata={"note": "kernel"})
    assert isinstance(layer.packed, QuantParam)
    assert "note" not in layer.perm.get_metadata()
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


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_a_reordered_weight_gives_the_product_of_the_original(backend):
    """Integers up to 2^24 are exact in float32, and those up to 2^8 in bfloat16."""
    spec, w, weights = make_reordered()
    x = np.zeros((2, 3, K), np.float32)
    x[..., 40:56] = np.random.default_rng(1).integers(-1, 2, (2, 3, 16))
    expected = x @ w.T
    assert 32 < np.abs(expected).max() <= 256
    narrow = jnp.asarray(x, jnp.bfloat16)
    layer = QuantDense.from_weights(weights, spec, backend=backend)
    linen_layer, variables = make_linen(spec, weights, backend=backend)
    assert isinstance(layer.perm, QuantParam)
    y = layer(narrow)
    np.testing.assert_array_equal(np.asarray(y, np.float32), expected)
    np.testing.assert_array_equal(linen_layer.apply(variables, narrow), y)


def test_a_reordered_weight_passes_the_gradient_to_the_features_of_x():
    spec, w, weights = make_reordered()
    layer = QuantDense.from_weights(weights, spec)
    assert set(nnx.grad(lambda layer: layer(make_input(4, K)).sum())(layer)) == {"scale"}
    slope = jax.jit(jax.grad(lambda x: layer(x).sum()))(make_input(2, K))
    np.testing.assert_array_equal(slope, np.broadcast_to(w.sum(0), (2, K)))


def test_a_new_act_order_layer_reorders_nothing():
    spec, _, weights = make_reordered()
    layer = QuantDense(spec, act_order=True)
    linen_layer, _ = make_linen(spec, weights)
    made = linen_layer.init(jax.random.key(0), make_input(1, K))["params"]
    np.testing.assert_array_equal(layer.perm[...], np.arange(K))
    np.testing.assert_array_equal(made["perm"], np.arange(K))
    assert layer.perm[...].dtype == made["perm"].dtype == jnp.int32
    assert not np.asarray(layer(make_input(2, K))).any()


def test_the_weights_of_a_layer_are_its_leaf_dict():
    spec, _, weights = make_reordered()
    weights["bias"] = make_input(N)
    found = QuantDense.from_weights(weights, spec).weights
    layer, variables = make_linen(spec, weights)
    bound = layer.bind(variables)
    assert set(found) == set(weights) == set(bound.weights)
    for name, leaf in weights.items():
        np.testing.assert_array_equal(found[name], leaf)
        np.testing.assert_array_equal(bound.weights[name], leaf)


@pytest.mark.parametrize("cls", [QuantDense, jaxwna16.linen.QuantDense])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"prefer": "space"},
            BackendError,
            r"prefer must be one of \('speed', 'memory'\), got 'space'",
        ),
        ({"backend": "cuda"}, BackendError, "backend must be None or one of .* got 'cuda'"),
        ({"backend": "triton", "dtype": jnp.float32}, BackendError, "x is float32"),
        ({"dtype": jnp.float64}, SpecError, "dtype must be .* got float64"),
        ({"dtype": "f15"}, SpecError, "dtype must be float32, bfloat16 or float16, got 'f15'"),
        ({"scale_dtype": None}, SpecError, "scale_dtype must be .* got None"),
        ({"bias_dtype": jnp.int32}, SpecError, "bias_dtype must be .* got int32"),
    ],
)
def test_impossible_options_are_refused_at_construction(cls, options, error, message):
    spec, _ = make_layer()
    with pytest.raises(error, match=message):
        cls(spec, **options)
    with pytest.raises(SpecError, match="QuantDense takes a QuantSpec, got dict"):
        cls({"bits": 4})


@pytest.mark.parametrize("dtype", [None, "bfloat16", jnp.float16])
def test_a_named_backend_takes_every_spelling_of_its_dtypes(dtype):
    spec, weights = make_layer(scale_dtype=jnp.bfloat16, use_bias=False)
    x = make_input(2, K).astype(jnp.bfloat16)
    layer = QuantDense.from_weights(weights, spec, dtype=dtype, backend="triton")
    linen_layer, variables = make_linen(spec, weights, dtype=dtype, backend="triton")
    y = layer(x)
    assert y.dtype == (dtype or jnp.bfloat16)
    np.testing.assert_array_equal(linen_layer.apply(variables, x), y)


@pytest.mark.parametrize(("prefer", "expands"), [("speed", True), ("memory", False)])
def test_prefer_decides_whether_many_rows_expand_the_weight(prefer, expands):
    spec, weights = make_layer(scale_dtype=jnp.bfloat16)
    x = make_input(2048, K).astype(jnp.bfloat16)
    options = {"backend": "triton", "prefer": prefer}
    layer = QuantDense.from_weights(weights, spec, **options)
    linen_layer, variables = make_linen(spec, weights, **options)
    for call in (layer, lambda x: linen_layer.apply(variables, x)):
        [kernel] = find_kernels(call, x)
        [out] = kernel.outvars
        assert out.aval.shape == ((N, K) if expands else (2048, N))


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


def test_second_derivatives_through_a_scan_are_those_of_the_floats():
    """A Hessian-vector product passes each of three products four times (forward, backward, and
    their tangents), with sums of less than 256 terms: 12 * 256 u of the largest entry.
    """
    square = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=64, out_features=64)
    stack = [jaxwna16.quantize(make_input(64, 64) / 8, square)] * 3
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack)
    floats = [jaxwna16.dequantize(leaves, square, jnp.float32) for leaves in stack]
    step = lambda x, w: (jnp.tanh(jaxwna16.quant_matmul(x, w, square)), None)  # noqa: E731
    x, v = make_input(2, 64), make_input(2, 64) * 0.3

    def multiply(f):
        slope = jax.grad(lambda x: (f(x) ** 2).sum())
        return jax.jit(jax.grad(lambda x: jnp.vdot(slope(x), v)))

    def loop(x):
        for w in floats:
            x = jnp.tanh(x @ w.T)
        return x

    expected = multiply(loop)(x)
    bound = 12 * 256 * 2.0**-24 * np.abs(expected).max()
    for body in (step, jax.checkpoint(step)):
        run = lambda x, body=body: jax.lax.scan(body, x, stacked)[0]  # noqa: E731
        np.testing.assert_allclose(multiply(run)(x), expected, rtol=0, atol=bound)
    _, forward = jax.jvp(jax.grad(lambda x: (run(x) ** 2).sum()), [x], [v])
    np.testing.assert_allclose(forward, expected, rtol=0, atol=bound)


def test_no_order_of_derivatives_keeps_a_float_weight_or_differentiates_a_kernel():
    square = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=K, out_features=K)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), jaxwna16.quantize(jnp.eye(K), square))

    def loss(x):
        step = lambda x, w: (jnp.tanh(jaxwna16.quant_matmul(x, w, square)), None)  # noqa: E731
        return jax.lax.scan(step, x, stack)[0].sum()

    x = jax.ShapeDtypeStruct((4, K), jnp.bfloat16)
    for slope in (loss, jax.grad(loss), lambda x: jax.grad(loss)(x).sum()):
        kept = jax.eval_shape(lambda x, f=slope: jax.tree.leaves(jax.vjp(f, x)[1]), x)
        assert "uint16" in {leaf.dtype.name for leaf in kept}
        assert max(leaf.size for leaf in kept if leaf.dtype.kind != "u") < K * K


def test_linen_trains_the_floats_of_a_tree_that_has_integers():
    spec, weights = make_layer()
    layer, variables = make_linen(spec, weights)
    trainable, rest = jaxwna16.split_params(variables)
    names = lambda tree: {name for name, leaf in tree["params"].items() if leaf is not None}  # noqa: E731
    assert names(trainable) == {"scale", "bias"}
    assert names(rest) == {"packed", "zero_point"}
    x, optimizer = make_input(4, K), optax.sgd(1e-4)

    def loss(trainable):
        return (layer.apply(jaxwna16.merge_params(trainable, rest), x) ** 2).mean()

    value, gradients = jax.value_and_grad(loss)(trainable)
    updates, _ = optimizer.update(gradients, optimizer.init(trainable))
    trained = optax.apply_updates(trainable, updates)
    assert loss(trained) < value
    merged = jaxwna16.merge_params(trained, rest)["params"]
    np.testing.assert_array_equal(merged["packed"], weights["packed"])
    assert (merged["scale"] != weights["scale"]).any()
    only, _ = jaxwna16.split_params(variables, wrt=lambda path: path == "params.bias")
    assert names(only) == {"bias"}


def test_parts_of_different_trees_are_not_merged():
    trainable, rest = jaxwna16.split_params(make_layer()[1])
    with pytest.raises(jaxwna16.InputError, match=r"bias must be in one of the two trees"):
        jaxwna16.merge_params(trainable, trainable)
    with pytest.raises(jaxwna16.InputError, match="differ in structure"):
        jaxwna16.merge_params({"layer": trainable}, rest)


def test_nnx_trains_scales_by_default_and_adapters_alone_where_asked():
    spec, weights = make_layer(use_bias=False)
    x = make_input(4, K)
    loss = lambda layer: (layer(x) ** 2).mean()  # noqa: E731
    for wrt, moves in ((nnx.Param, True), (nnx.LoRAParam, False)):
        base = QuantDense.from_weights(weights, spec)
        layer = nnx.LoRA(K, 2, N, base_module=base, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(layer, optax.sgd(1e-4), wrt=wrt)
        gradients = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(layer)
        assert ("base_module" in gradients) == moves
        before = np.asarray(layer.lora_b[...])
        optimizer.update(layer, gradients)
        assert (np.asarray(base.scale[...]) != weights["scale"]).any() == moves
        assert (np.asarray(layer.lora_b[...]) != before).any()
