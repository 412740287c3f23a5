"""Random packed layers of one K, and what rounding explains of their products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxwna16
from jaxwna16 import QuantDense, QuantSpec
from jaxwna16.models.parts.layers import Dense

K = 128
F32, BF16 = 2.0**-24, 2.0**-8


def make_layer(
    n: int = 96,
    *,
    bits: int = 4,
    symmetric: bool = True,
    bias: bool = False,
    perm: bool = False,
    seed: int = 0,
    scale_dtype: Any = jnp.float32,
    cls: type[QuantDense] = QuantDense,
    **options: Any,
) -> QuantDense:
    spec = QuantSpec(bits=bits, group_size=32, symmetric=symmetric, in_features=K, out_features=n)
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.normal(size=(n, K)).astype(np.float32))
    weights = jaxwna16.quantize(w, spec, scale_dtype=scale_dtype)
    if bias:
        weights["bias"] = jnp.asarray(rng.normal(size=n).astype(np.float32))
    if perm:
        weights["perm"] = jnp.asarray(rng.permutation(K).astype(np.int32))
    return cls.from_weights(weights, spec, **options)


def make_narrow(n: int = 96, **options) -> QuantDense:
    return make_layer(n, scale_dtype=jnp.bfloat16, backend="triton", **options)


def make_plain(n: int) -> Dense:
    layer = Dense(n, K, use_bias=True, dtype=jnp.float32)
    layer.weight.set_value(make_input(n, K))
    return layer


def make_input(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    return jnp.asarray(x.astype(dtype))  # by NumPy, since XLA compiles a cast for every shape


def make_three(**options) -> list[QuantDense]:
    return [
        make_layer(seed=1, bias=True, **options),
        make_layer(seed=2, bias=True, **options),
        make_layer(32, symmetric=False, perm=True, **options),
    ]


def weight_of(layer: QuantDense) -> np.ndarray:
    """Float64 [N, K] with its features in the order of x, as the Triton kernel uses it.

    In float32 an integer below 2^9 times a 16-bit scale is exact; times a float32 scale it is
    rounded, as the XLA path rounds it.
    """
    leaves = layer.weights
    leaves |= {"scale": leaves["scale"].astype(jnp.float32)}
    perm = np.asarray(leaves.pop("perm", np.arange(K)))
    w = np.asarray(jaxwna16.dequantize(leaves, layer.spec), np.float64)
    restored = np.empty_like(w)
    restored[:, perm] = w
    return restored


def multiply_exactly(layer: QuantDense, x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The product with its bias in float64, and a bound of its error in float32.

    A sum of K products, the padding of a split and a bias, in any order: gamma |x| |W|, gamma = K'
    u / (1 - K' u) with K' = K + 64 (Higham, Accuracy and Stability, 3.1).
    """
    w, wide = weight_of(layer), np.asarray(x, np.float64)
    bias = np.zeros(len(w)) if layer.bias is None else np.asarray(layer.bias[...], np.float64)
    gamma = (K + 64) * F32 / (1 - (K + 64) * F32)
    magnitude = np.abs(wide) @ np.abs(w).T + np.broadcast_to(np.abs(bias), (*x.shape[:-1], len(w)))
    return wide @ w.T + np.broadcast_to(bias, magnitude.shape), gamma * magnitude


def round_error(y: np.ndarray, error: np.ndarray, unit: float) -> np.ndarray:
    """The error of y after one more rounding."""
    return error + unit * (np.abs(y) + error)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def assert_within(found: jax.Array, expected, bound) -> None:
    error = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    assert found.shape == error.shape == bound.shape
    worst = np.max(error / bound)
    assert worst <= 1, f"{worst:.3f} times the error that rounding explains"
