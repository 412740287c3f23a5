"""Packed weights made code by code, and the tight bound of the kernels' own arithmetic."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.format.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Case:
    """Arrays as the kernel takes them, and the weight [N, K] they stand for, exact in float64."""

    spec: QuantSpec
    packed: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    weight: np.ndarray

    @property
    def weights(self) -> dict[str, jax.Array]:
        leaves = {"packed": self.packed, "scale": self.scale, "zero_point": self.zero_point}
        return {name: jnp.asarray(leaf) for name, leaf in leaves.items() if leaf is not None}


def make_case(
    shape, group_size, bits, *, symmetric, scale_dtype=jnp.bfloat16, seed=0, whole=False
) -> Case:
    """Random codes, packed one by one as the layout is defined; padding is 0.

    `whole`: scales are small powers of two, so that sums with whole x are exact.
    """
    n, k = shape
    spec = QuantSpec(
        bits=bits, group_size=group_size, symmetric=symmetric, in_features=k, out_features=n
    )
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (n, k))
    packed = np.zeros(spec.packed_shape, np.uint16)
    row, column = np.indices((n, k))
    tile, rest = np.divmod(column, spec.tile_k)
    plane, j = np.divmod(rest, 32)
    fields = (codes << bits * plane).astype(np.uint16)
    np.bitwise_or.at(packed, (row // 64, tile, row % 64, j), fields)
    scale = np.zeros(spec.scale_shape, scale_dtype)
    scales = rng.uniform(0.005, 0.02, (spec.groups, n))
    if whole:
        scales = 2.0 ** rng.integers(-2, 3, (spec.groups, n))
    scale[:, :n] = scales.astype(scale_dtype)
    zero_point = np.zeros(spec.scale_shape, np.int8)
    if not symmetric:
        half = 2 ** (bits - 1)
        zero_point[:, :n] = rng.integers(-half, half, (spec.groups, n))
    per_column = [
        np.repeat(a[:, :n], spec.group_size, axis=0).T.astype(np.float64)
        for a in (zero_point, scale)
    ]
    weight = (codes - float(spec.offset) - per_column[0]) * per_column[1]
    return Case(spec, packed, scale, None if symmetric else zero_point, weight)


def assert_exact(out, x, case: Case, *, splits: int = 1, scale_on: str = "sum"):
    """Hold `out` to a bound that follows from the kernel's arithmetic, entry by entry.

    Each product (q - zero) * x is exact in float32 (at most 9 + 11 significant bits). A term then
    passes at most K + 2 + splits float32 roundings (additions, and the product with the scale), so
    with u = 2^-24 and n = K + 2 + splits the sum before the last rounding is within
    gamma = n u / (1 - n u) times |x| @ |W|.T of the exact one (Higham, Accuracy and Stability of
    Numerical Algorithms, 3.1). Rounding to the output adds at most v = 2^-8 (bfloat16) or 2^-11
    (float16) of the result, and in float16 half of its smallest subnormal, 2^-25.
    Where groups straddle slabs, or the scale is on the weight, each weight is rounded to float32
    and to the dtype of x beforehand: v + u of |x| @ |W|.T more, and in float16 2^-25 of sum |x|.
    """
    spec, dtype = case.spec, x.dtype
    assert out.dtype == dtype
    assert out.shape == (x.shape[0], spec.out_features)
    exact_x = np.asarray(x, np.float64)
    exact = exact_x @ case.weight.T
    magnitude = np.abs(exact_x) @ np.abs(case.weight).T
    u, v, tiny = 2.0**-24, *((2.0**-8, 0.0) if dtype == jnp.bfloat16 else (2.0**-11, 2.0**-25))
    count = spec.in_features + 2 + splits
    gamma = count * u / (1 - count * u)
    error = gamma * magnitude
    if scale_on == "weight" or (spec.groups > 1 and spec.group_size % 32):
        rounding = (v + 2 * u) * magnitude + tiny * np.abs(exact_x).sum(1, keepdims=True)
        error = error + (1 + gamma) * rounding
    bound = error + v * (np.abs(exact) + error) + tiny
    # a bound that some other computation would meet as well shows nothing
    assert np.median(bound / magnitude) < 2 * v
    worst = np.max(np.abs(np.asarray(out, np.float64) - exact) / bound)
    assert worst <= 1, f"{worst:.3f} times the error that rounding explains"
