"""Packed weights to multiply by, and the bound that their products are held to."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from loaders.modules.repack import pack
from pallas_kernels.format.dequantize import dequantize
from pallas_kernels.format.spec import QuantSpec
from tests.folders import make_tensors

UNIT = {jnp.float32: 2.0**-24, jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11}
"""Unit roundoff of the dtypes that x can have."""


def make_weights(bits=4, n=40, k=96, group=32, *, symmetric=False, scale_dtype=np.float32, seed=0):
    """A spec, and the leaf dict of a random weight of it."""
    spec = QuantSpec(
        bits=bits, group_size=group, symmetric=symmetric, in_features=k, out_features=n
    )
    return spec, pack(make_tensors(spec, scale_dtype=scale_dtype, seed=seed), spec)


def make_x(shape, dtype=jnp.float32, seed=1):
    """Normal x of a shape and dtype."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(x.astype(dtype))  # by NumPy, since XLA compiles a cast for every shape


def assert_close(out, x, weights, spec, *, exact_scale=False, bias=None, sums=1):
    """Hold `out` [M, N] to a bound that follows from the arithmetic, entry by entry.

    Reference: float64 on the weight that `dequantize` gives, W (rounded to the scale's dtype as
    compressed-tensors rounds it). Let u = 2^-24, v the unit roundoff of x's dtype (2^-24, 2^-8,
    2^-11), a = |x| @ |W|.T.
    * XLA casts W to x's dtype: v a (0 in float32, which holds every W; in float16 also half its
      smallest subnormal per weight, 2^-25 sum |x|).
    * A float32 sum of K products in any order: gamma a with gamma = K' u / (1 - K' u), K' = K + 64
      (the padding of a tile may be added) (Higham, Accuracy and Stability, 3.1).
    * `exact_scale`: the Triton kernel does not round W to the scale's dtype, which is one more
      relative error 2^-8 (bfloat16 scales) of W, for 2^-8 a.
    * The result, and once more with a bias, is rounded to x's dtype: v |y| and 2^-25 in float16.
    * `sums` multiplies gamma, for hardware that adds less exactly than float32.
    """
    u, v = 2.0**-24, UNIT[x.dtype.type]
    tiny = 2.0**-25 if x.dtype == jnp.float16 else 0.0
    exact_x = np.asarray(x, np.float64)
    y, magnitude = _multiply_exactly(exact_x, np.asarray(dequantize(weights, spec)))
    gamma = sums * (spec.in_features + 64) * u / (1 - (spec.in_features + 64) * u)
    narrow = 0.0 if x.dtype == jnp.float32 else v
    weight_error = narrow + (2.0**-8 if exact_scale else 0.0)
    error = (weight_error + gamma) * (1 + gamma) * magnitude
    error = error + tiny * (1 + np.abs(exact_x).sum(1, keepdims=True))
    error = error + v * (np.abs(y) + error)
    if bias is not None:
        y = y + np.asarray(bias, np.float64)
        error = error + (u + v) * (np.abs(y) + error) + tiny
    assert out.dtype == x.dtype
    assert out.shape == y.shape
    worst = np.max(np.abs(np.asarray(out, np.float64) - y) / error, initial=0.0)
    assert worst <= 1, f"{worst:.3f} times the error that rounding explains"


def _multiply_exactly(x, w):
    """x @ w.T and |x| @ |w|.T [M, N] of float64 x, with few rows of w in float64 at a time."""
    parts = (w[n : n + 256].astype(np.float64) for n in range(0, len(w), 256))
    pairs = [(x @ part.T, np.abs(x) @ np.abs(part).T) for part in parts]
    return (np.concatenate(blocks, axis=1) for blocks in zip(*pairs, strict=True))
