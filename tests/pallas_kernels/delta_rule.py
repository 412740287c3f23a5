"""One token of the gated delta rule in float64, with how far float32 and 16 bits may lie from it.

Each operation takes and gives `Bounded`: it carries the errors of its operands over by its slope,
and adds its own. An exponential of x in float32 has a relative error of at most (|x| + 4) u, since
its argument is rounded; quotients, roots and logarithms add a few u.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.triton.parts import Parts
from tests.executed.bounds import DTYPES, Bounded, U


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a step; `parts`: of each product, float32 if several."""

    rows: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    width: int
    dtype: str
    parts: int = 1
    bias: bool = False

    @property
    def features(self) -> int:
        """C."""
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim


EPS = 1e-6


def draw_weights(sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    dtype = DTYPES[sizes.dtype]
    return {
        "conv_weight": rng.standard_normal((sizes.features, sizes.width)).astype(dtype),
        "A_log": rng.standard_normal(sizes.heads).astype(np.float32),
        "dt_bias": rng.standard_normal(sizes.heads).astype(np.float32),
        "norm_weight": rng.standard_normal(sizes.value_dim).astype(dtype),
    }


def draw_products(sizes: Sizes, seed: int) -> list[Parts]:
    """qkv, z, b and a."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[sizes.dtype]
    products = []
    for features in (sizes.features, sizes.heads * sizes.value_dim, sizes.heads, sizes.heads):
        sums = rng.standard_normal((sizes.parts, sizes.rows, features))
        bias = rng.standard_normal(features).astype(dtype) if sizes.bias else None
        sums = sums.astype(np.float32 if sizes.parts > 1 else dtype)
        products.append(_join(sums, bias))
    return products


def _join(sums: Any, bias: Any) -> Parts:
    """Of arrays of NumPy."""
    return Parts(sums, bias)


def draw_cache(sizes: Sizes, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of the convolution, and the state."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((sizes.rows, sizes.width - 1, sizes.features))
    state = rng.standard_normal((sizes.rows, sizes.heads, sizes.key_dim, sizes.value_dim))
    return inputs.astype(DTYPES[sizes.dtype]), state.astype(np.float32)


def add_exactly(parts: Parts, dtype: Any) -> np.ndarray:
    """To the bit: float32 sums in order, then one rounding."""
    total = np.asarray(parts.sums[0]).astype(np.float32)
    for part in np.asarray(parts.sums[1:]):
        total = total + part
    if parts.bias is not None:
        total = total + np.asarray(parts.bias).astype(np.float32)
    return total.astype(dtype)


def shift_inputs(qkv: Parts, inputs: np.ndarray, active: np.ndarray) -> np.ndarray:
    """The inputs after the step, to the bit."""
    x = add_exactly(qkv, inputs.dtype)
    moved = np.concatenate([inputs[:, 1:], x[:, None]], axis=1)
    return np.where(active[:, None, None] > 0, moved, inputs)


def step(
    sizes: Sizes,
    products: list[Parts],
    weights: dict[str, np.ndarray],
    inputs: np.ndarray,
    state: Bounded,
    active: np.ndarray,
) -> tuple[Bounded, Bounded]:
    """y [B, Hv * Dv] and the new state, which are 0 and the old one in rows that are not active."""
    dtype = DTYPES[sizes.dtype]
    x, z, b, a = (add_exactly(parts, dtype) for parts in products)
    line = np.concatenate([inputs, x[:, None]], axis=1).swapaxes(1, 2).astype(np.float64)
    taps = line * weights["conv_weight"].astype(np.float64)[None]
    mixed = _silu(_add_up(exactly(taps)).round_to(dtype)).round_to(dtype)
    keys = sizes.key_heads * sizes.key_dim
    q, k = (_divide(_cut(mixed, slice(i * keys, (i + 1) * keys), sizes.key_dim), 1) for i in (0, 1))
    # key heads serve value heads in a row
    q, k = (_apply(part, np.repeat, sizes.heads // sizes.key_heads, 1) for part in (q, k))
    q = q.times(np.array(sizes.key_dim**-0.5))
    v = _cut(mixed, slice(2 * keys, None), sizes.value_dim)
    beta, decay = _find_factors(a, b, weights, dtype)
    held = _multiply(state, _apply(decay, np.expand_dims, (2, 3)))
    columns, rows = (_apply(part, np.expand_dims, 3) for part in (k, q))
    seen = _add_up(_multiply(held, columns), axis=2)
    delta = _multiply(_add(v, _negate(seen)), _apply(beta, np.expand_dims, 2))
    fresh = _add(held, _multiply(columns, _apply(delta, np.expand_dims, 2)))
    out = _add_up(_multiply(fresh, rows), axis=2).round_to(dtype)
    scaled = _divide(out, sizes.value_dim).round_to(dtype)
    scaled = scaled.times(weights["norm_weight"].astype(np.float64)).round_to(dtype)
    gates = _silu(exactly(z.reshape(scaled.value.shape)))
    y = _apply(_multiply(scaled, gates).round_to(dtype), np.reshape, (sizes.rows, -1))
    on = active > 0
    kept = on[:, None, None, None]
    state = Bounded(
        np.where(kept, fresh.value, state.value), np.where(kept, fresh.error, state.error)
    )
    return Bounded(np.where(on[:, None], y.value, 0), np.where(on[:, None], y.error, 0)), state


def exactly(array: np.ndarray) -> Bounded:
    return Bounded(array.astype(np.float64), np.zeros(array.shape))


def _find_factors(a, b, weights: dict[str, np.ndarray], dtype: Any) -> tuple[Bounded, Bounded]:
    """beta and the decay, [B, Hv]."""
    beta = _sigmoid(exactly(b)).round_to(dtype)
    x = _add(exactly(a), exactly(weights["dt_bias"]))
    slope = np.logaddexp(x.value, 0)
    slope = Bounded(slope, x.error + slope * (np.abs(x.value) + 16) * U)
    rate = weights["A_log"].astype(np.float64)
    speed = Bounded(np.exp(rate), np.exp(rate) * (np.abs(rate) + 4) * U)
    exponent = _multiply(speed, slope)
    decay = np.exp(-exponent.value)
    error = np.expm1(exponent.error) + (exponent.value + 4) * U
    return beta, Bounded(decay, decay * error)


def _apply(x: Bounded, function, *arguments) -> Bounded:
    """What moves numbers and computes none."""
    return Bounded(function(x.value, *arguments), function(x.error, *arguments))


def _cut(x: Bounded, features: slice, size: int) -> Bounded:
    """[B, C] -> [B, heads, size]."""
    rows = x.value.shape[0]
    return _apply(x, lambda array: array[:, features].reshape(rows, -1, size))


def _negate(x: Bounded) -> Bounded:
    return Bounded(-x.value, x.error)


def _add(x: Bounded, y: Bounded) -> Bounded:
    return Bounded(x.value + y.value, x.error + y.error)._round(U)


def _multiply(x: Bounded, y: Bounded) -> Bounded:
    error = np.abs(x.value) * y.error + x.error * (np.abs(y.value) + y.error)
    return Bounded(x.value * y.value, error)._round(U)


def _add_up(x: Bounded, axis: int = -1) -> Bounded:
    """n terms, each of which passes a product and at most n - 1 additions."""
    count = x.value.shape[axis]
    magnitude = (np.abs(x.value) + x.error).sum(axis)
    return Bounded(x.value.sum(axis), x.error.sum(axis) + 1.01 * count * U * magnitude)


def _sigmoid(x: Bounded) -> Bounded:
    value = 1 / (1 + np.exp(-x.value))
    return Bounded(value, 0.25 * x.error + value * (np.abs(x.value) + 8) * U)


def _silu(x: Bounded) -> Bounded:
    value = x.value / (1 + np.exp(-x.value))
    return Bounded(value, 1.1 * x.error + np.abs(value) * (np.abs(x.value) + 10) * U)


def _divide(x: Bounded, count: int) -> Bounded:
    """x / sqrt(sum(x^2) / count + eps) over the last axis.

    That root changes by at most the length of the errors over sqrt(count).
    """
    squares = (x.value**2).sum(-1, keepdims=True) / count
    root = np.sqrt(squares + EPS)
    change = np.sqrt((x.error**2).sum(-1, keepdims=True) / count)
    value = x.value / root
    error = (x.error + np.abs(value) * change) / (root - change)
    error = np.where(change < root, error, np.inf)
    return Bounded(value, error + (np.abs(value) + error) * (x.value.shape[-1] + 8) * U)


def convert(products: list[Parts]) -> list[Parts]:
    """As arrays of jax."""
    return [
        Parts(jnp.asarray(p.sums), None if p.bias is None else jnp.asarray(p.bias))
        for p in products
    ]
