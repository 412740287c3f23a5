"""Random packed experts, what they make of tokens in float64, and what rounding explains."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.format.dequantize import dequantize
from pallas_kernels.format.spec import QuantSpec
from tests.pallas_kernels.products import UNIT, make_weights

U = 2.0**-24
SILU_SLOPE = 1.1


@dataclasses.dataclass(frozen=True)
class Experts:
    """Stacks of E experts, gate and up joined."""

    specs: tuple[QuantSpec, QuantSpec]
    stacks: tuple[dict[str, jax.Array], dict[str, jax.Array]]

    @property
    def arguments(self) -> tuple:
        """As `quant_moe` takes them after ids and weights."""
        return *self.stacks, *self.specs

    def take(self, first: int, count: int) -> Experts:
        """Those from the first on, so many."""
        stacks = jax.tree.map(lambda leaf: leaf[first : first + count], self.stacks)
        return dataclasses.replace(self, stacks=stacks)

    def list_floats(self, *, exact: bool) -> list[np.ndarray]:
        """[E, N, K] in float64: as compressed-tensors rounds them, or unrounded.

        An integer of 9 bits times a scale of 11 is exact in float32.
        """
        found = []
        for stack, spec in zip(self.stacks, self.specs, strict=True):
            leaves = {name: leaf for name, leaf in stack.items() if name != "bias"}
            if exact:
                leaves["scale"] = leaves["scale"].astype(jnp.float32)
            found.append(np.asarray(dequantize(leaves, spec), np.float64))
        return found

    def list_biases(self) -> list[np.ndarray]:
        """[E, N] in float64, zeros without a bias."""
        return [
            np.asarray(stack["bias"], np.float64)
            if "bias" in stack
            else np.zeros((stack["packed"].shape[0], spec.out_features))
            for stack, spec in zip(self.stacks, self.specs, strict=True)
        ]


def make_experts(
    experts=8,
    hidden=64,
    inner=64,
    *,
    bits=(4, 4),
    groups=(32, 32),
    symmetric=False,
    scale_dtype=jnp.bfloat16,
    bias=False,
    seed=0,
) -> Experts:
    """Random experts whose results are about as large as what they are given."""
    shapes = (2 * inner, hidden), (hidden, inner)
    specs, stacks = [], []
    for part, (n, k) in enumerate(shapes):
        each = []
        for e in range(experts):
            spec, weights = make_weights(
                bits[part],
                n,
                k,
                groups[part],
                symmetric=symmetric,
                scale_dtype=scale_dtype,
                seed=1000 * seed + 100 * part + e,
            )
            if bias:
                rng = np.random.default_rng(e)
                weights["bias"] = jnp.asarray(rng.normal(size=n), scale_dtype)
            each.append(weights)
        specs.append(spec)
        stacks.append(jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *each))
    return Experts(tuple(specs), tuple(stacks))


def draw_choices(tokens, experts, top_k, seed=0, *, repeated=False):
    """ids int32 and weights float32 [T, k]; an expert twice only if `repeated`."""
    rng = np.random.default_rng(seed)
    if repeated:
        ids = rng.integers(0, experts, (tokens, top_k))
    else:
        ids = rng.random((tokens, experts)).argsort(1)[:, :top_k]
    weights = rng.uniform(0.1, 1, (tokens, top_k))
    return jnp.asarray(ids, jnp.int32), jnp.asarray(weights, jnp.float32)


def assert_sum_of_experts(
    y, x, ids, weights, experts: Experts, *, kernel=False, rounded_early=False, offset=0, sums=1
):
    """Hold `y` [T, H] to a bound that follows from the arithmetic, entry by entry.

    Reference: float64 with silu, on weights that are rounded as compressed-tensors does (the XLA
    path) or not at all (`kernel`). Let u = 2^-24, v the unit roundoff of x's dtype and gamma(n) =
    n u / (1 - n u) (Higham, Accuracy and Stability, 3.1).
    * A product of K terms, with padding of a tile, scales and splits: gamma(K + 80) |x| |W|, and
      v |x| |W| more where the weight is rounded to x's dtype (the XLA path in 16 bits, and
      `rounded_early`).
    * gate and up are rounded to x's dtype before the activation if `rounded_early`: v |h|.
    * silu(g) up: |silu'| <= 1.1, so 1.1 dg (|up| + du) + |silu(g)| du; 16 u for its few operations;
      then v for rounding to x's dtype.
    * The second product as the first; weights, and the sum of top_k: gamma(k + 3); rounded before
      that sum if `rounded_early`, and after it always: v.
    * `sums` multiplies gamma of the products, for hardware that adds less exactly than float32.
    """
    v = UNIT[x.dtype.type]
    tiny = 2.0**-25 if x.dtype == jnp.float16 else 0.0
    narrow = 0.0 if x.dtype == jnp.float32 else v
    on_weight = narrow if rounded_early or not kernel else 0.0
    w13, w2 = experts.list_floats(exact=kernel)
    b13, b2 = experts.list_biases()
    xs, factors = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    expected = np.zeros((xs.shape[0], w2.shape[1]))
    error = np.zeros_like(expected)
    magnitude = np.zeros_like(expected)
    for choice in range(ids.shape[1]):
        for e in range(w13.shape[0]):
            rows = np.flatnonzero(np.asarray(ids)[:, choice] == e + offset)
            one = xs[rows]
            h = one @ w13[e].T + b13[e]
            dh = (sums * gamma(one.shape[1] + 80) + on_weight) * (np.abs(one) @ np.abs(w13[e]).T)
            dh += U * np.abs(h) + (narrow * np.abs(h) + tiny if rounded_early else 0.0)
            (g, up), (dg, du) = np.split(h, 2, axis=1), np.split(dh, 2, axis=1)
            silu = g / (1 + np.exp(-g))
            a = silu * up
            da = SILU_SLOPE * dg * (np.abs(up) + du) + np.abs(silu) * du + 16 * U * np.abs(a)
            da += narrow * (np.abs(a) + da) + tiny
            y_one = a @ w2[e].T + b2[e]
            dy = da @ np.abs(w2[e]).T + U * np.abs(y_one)
            spread = (np.abs(a) + da) @ np.abs(w2[e]).T
            dy += (sums * gamma(a.shape[1] + 80) + on_weight) * spread
            dy += narrow * (np.abs(y_one) + dy) + tiny if rounded_early else 0.0
            factor = factors[rows, choice][:, None]
            expected[rows] += factor * y_one
            error[rows] += factor * dy
            magnitude[rows] += factor * (np.abs(y_one) + dy)
    error += gamma(ids.shape[1] + 3) * magnitude
    error += v * (np.abs(expected) + error) + tiny
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    found = np.abs(np.asarray(y, np.float64) - expected)
    worst = np.max(found / np.maximum(error, 1e-300), initial=0.0)
    assert worst <= 1, f"{worst:.3f} times the error that rounding explains"
    # a bound that some other sum would meet as well shows nothing; in 16 bits, where the worst case
    # is far off, the error is also held to what independent roundings give: seven (W, h, gate and
    # up, a, W2, y, the sum), 0.42 v each (rms, docs/numerics.md), so 1.1 v, and a few for silu
    size, rms = np.sqrt((expected**2).mean()), np.sqrt((found**2).mean())
    if x.dtype == jnp.float32:
        assert np.median(error) < 0.01 * size
    else:
        assert rms < 3 * v * size


def gamma(count: int) -> float:
    return count * U / (1 - count * U)
