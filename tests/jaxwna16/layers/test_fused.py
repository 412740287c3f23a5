"""Layers that share their input: together they compute what each computes by itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxwna16
from jaxwna16 import QuantDense, QuantSpec, SpecError, gated, project
from tests.grids import cover
from tests.jaxprs import find_kernels
from tests.jaxwna16.layers.dense_layers import (
    BF16,
    F32,
    K,
    assert_within,
    make_input,
    make_layer,
    make_narrow,
    make_plain,
    multiply_exactly,
    round_error,
    silu,
    weight_of,
)


class Doubled(QuantDense):
    """What a user may make of the layer."""

    def __call__(self, x, out_sharding=None):
        return 2 * super().__call__(x, out_sharding)


MIXES = {
    "alike": lambda **o: [make_layer(96, seed=i, **o) for i in range(3)],
    "of three widths": lambda **o: [make_layer(n, **o) for n in (96, 32, 7)],
    "with biases": lambda **o: [make_layer(96, bias=b, seed=b, **o) for b in (True, False)],
    "4 bits, 8 bits, asymmetric": lambda **o: [
        make_layer(96, **o),
        make_layer(96, bits=8, **o),
        make_layer(96, symmetric=False, bias=True, **o),
        make_layer(64, seed=1, **o),
    ],
    "reordered": lambda **o: [make_layer(perm=p, seed=p, **o) for p in (True, False, True)],
}


def gate_exactly(gate, up, x, *, apart: bool) -> tuple[np.ndarray, np.ndarray]:
    """silu(g) * u in float64, and a bound of its error in bfloat16.

    `apart` rounds five times: g, u, sigmoid(g), silu(g) and the result; together it is only the
    result. |silu'| < 1.1, so an error e of g is at most 1.1 e of silu(g). XLA's float32 sigmoid is
    within 4 u of its own largest value, 1.
    """
    (g, g_error), (u, u_error) = multiply_exactly(gate, x), multiply_exactly(up, x)
    if apart:
        g_error, u_error = round_error(g, g_error, BF16), round_error(u, u_error, BF16)
    s, s_error = silu(g), 1.1 * g_error + 4 * F32 * (np.abs(g) + g_error)
    if apart:
        s_error = round_error(s, round_error(s, s_error, BF16), BF16)
    y, error = s * u, np.abs(s) * u_error + s_error * (np.abs(u) + u_error)
    return y, round_error(y, round_error(y, error, F32), BF16)


@pytest.mark.parametrize(("mix", "tokens"), cover(list(MIXES), [1, 5]))
def test_in_float32_together_is_bit_for_bit_apart(mix, tokens):
    layers, x = MIXES[mix](), make_input(2, tokens, K)
    together = project(x, layers)
    assert len(together) == len(layers)
    for y, layer in zip(together, layers, strict=True):
        np.testing.assert_array_equal(y, layer(x))
    first, last = layers[0], layers[-1]
    if first.spec.out_features == last.spec.out_features:
        np.testing.assert_array_equal(gated(x, first, last), jax.nn.silu(first(x)) * last(x))


@pytest.mark.parametrize(("mix", "backend"), cover(list(MIXES), ["xla", "triton", None]))
def test_in_bfloat16_each_projection_is_the_product_within_the_bound(mix, backend):
    layers = MIXES[mix](scale_dtype=jnp.bfloat16, backend=backend)
    x = make_input(3, K, dtype=jnp.bfloat16)
    together = jax.jit(lambda x: project(x, layers))(x)
    apart = jax.jit(lambda x: [layer(x) for layer in layers])(x)
    for y, alone, layer in zip(together, apart, layers, strict=True):
        assert y.dtype == jnp.bfloat16
        exact, error = multiply_exactly(layer, x)
        if backend != "triton":
            # W is rounded to the dtype of the scales, 2^-8 of it; that is the dtype of x as well
            error += BF16 * (np.abs(np.asarray(x, np.float64)) @ np.abs(weight_of(layer)).T)
        error = round_error(exact, error, BF16)
        assert_within(y, exact, error)
        assert_within(y, alone, 2 * error)


@pytest.mark.parametrize("bias", [True, False])
def test_in_bfloat16_gated_rounds_once_and_apart_five_times(bias):
    """On the Triton kernel, which does not round the weight."""
    gate, up = make_narrow(bias=bias), make_narrow(bias=bias, seed=1)
    x = make_input(3, K, dtype=jnp.bfloat16) / 8
    exact, once = gate_exactly(gate, up, x, apart=False)
    _, five_times = gate_exactly(gate, up, x, apart=True)
    y, apart = gated(x, gate, up), jax.nn.silu(gate(x)) * up(x)
    assert_within(y, exact, once)
    assert_within(y, apart, once + five_times)
    # the first bound is one that more roundings break
    assert (np.abs(np.asarray(apart, np.float64) - exact) > once).any()


def test_gated_of_other_specs_is_within_the_bound_of_apart():
    gate, x = make_narrow(), make_input(3, K, dtype=jnp.bfloat16)
    for up in (make_narrow(bits=8, symmetric=False), make_narrow(perm=True)):
        exact, bound = gate_exactly(gate, up, x, apart=True)
        assert_within(gated(x, gate, up), exact, bound)


def test_layers_of_other_kinds_and_settings_are_called_by_themselves(monkeypatch):
    calls = []

    def record(x, weights, specs, **settings):
        calls.append((x.dtype.name, len(specs), settings))
        return jaxwna16.quant_matmul_many(x, weights, specs, **settings)

    monkeypatch.setattr("jaxwna16.layers.fused.quant_matmul_many", record)
    layers: list[Any] = [
        make_layer(),
        make_plain(40),
        make_layer(cls=Doubled),
        make_layer(dtype=jnp.bfloat16),
        make_layer(16, bits=8),
        make_layer(backend="xla"),
        make_layer(prefer="memory"),
        make_layer(16, dtype="bfloat16"),
    ]
    x = make_input(2, K)
    together = project(x, layers)
    assert calls == [
        ("float32", 2, {"backend": None, "prefer": "speed"}),
        ("bfloat16", 2, {"backend": None, "prefer": "speed"}),
        ("float32", 1, {"backend": "xla", "prefer": "speed"}),
        ("float32", 1, {"backend": None, "prefer": "memory"}),
    ]
    for y, layer in zip(together, layers, strict=True):
        expected = layer(x)
        assert y.dtype == expected.dtype
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("kind", ["plain", "subclass", "another backend"])
def test_gated_with_a_layer_of_another_kind_is_apart(kind):
    up = {
        "plain": lambda: make_plain(96),
        "subclass": lambda: make_layer(cls=Doubled),
        "another backend": lambda: make_layer(backend="xla"),
    }[kind]()
    x, gate = make_input(2, K), make_layer(seed=1)
    for first, second in ((gate, up), (up, gate)):
        expected = jax.nn.silu(first(x)) * second(x)
        np.testing.assert_array_equal(gated(x, first, second), expected)


def test_no_layers_are_no_results():
    assert project(make_input(2, K), []) == ()


def test_layers_that_do_not_fit_are_an_error_of_ours():
    with pytest.raises(SpecError, match=r"x must be \[..., 128\], got \[2, 64\]"):
        project(make_input(2, 64), [make_layer(), make_layer(32)])
    with pytest.raises(SpecError, match="gate and up must have the same N, got 96 and 32"):
        gated(make_input(2, K), make_layer(), make_layer(32))


def test_a_reordered_weight_multiplies_as_the_unordered_one():
    layers = [make_layer(perm=True, seed=i) for i in range(2)]
    x = make_input(3, K)
    for y, layer in zip(project(x, layers), layers, strict=True):
        exact, error = multiply_exactly(layer, x)
        assert_within(y, exact, round_error(exact, error, F32))


class Projections(nn.Module):
    specs: tuple[QuantSpec, ...]
    use_bias: bool
    act_order: bool

    @nn.compact
    def __call__(self, x):
        layers = [
            jaxwna16.linen.QuantDense(
                spec,
                use_bias=self.use_bias,
                act_order=self.act_order,
                scale_dtype=jnp.float32,
                name=f"p{i}",
            )
            for i, spec in enumerate(self.specs)
        ]
        return project(x, layers), gated(x, *layers[:2])


@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linen_equals_nnx(extras, dtype):
    widths = ((96, 4), (96, 4), (32, 8))
    layers = [make_layer(n, bits=b, bias=extras, perm=extras) for n, b in widths]
    params = {f"p{i}": layer.weights for i, layer in enumerate(layers)}
    model = Projections(tuple(layer.spec for layer in layers), extras, extras)
    x = make_input(2, K, dtype=dtype)
    projected, product = model.apply({"params": params}, x)
    for y, expected in zip(projected, project(x, layers), strict=True):
        np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(product, gated(x, *layers[:2]))
    made = model.init(jax.random.key(0), x)["params"]
    facts = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert facts(made) == facts(params)


def count_kernels(call, *layers) -> int:
    x = make_input(2, K, dtype=jnp.bfloat16)
    return len(find_kernels(lambda x: call(x, layers), x))


def test_projections_are_one_kernel_for_each_distinct_spec():
    alike = [make_narrow(), make_narrow(bias=True), make_narrow(32)]
    wide, shifted = make_narrow(bits=8), make_narrow(symmetric=False)
    assert count_kernels(project, *alike) == 1
    assert count_kernels(project, wide, *alike) == 2
    assert count_kernels(project, *alike, wide, shifted, wide) == 3
    assert count_kernels(project, *alike, make_narrow(perm=True)) == 2
    assert count_kernels(lambda x, layers: [layer(x) for layer in layers], *alike) == 3


def test_gated_is_one_kernel_where_the_specs_are_equal():
    gate = make_narrow()
    call = lambda x, layers: gated(x, *layers)  # noqa: E731
    assert count_kernels(call, gate, make_narrow(bias=True)) == 1
    assert count_kernels(call, gate, make_narrow(bits=8)) == 2
