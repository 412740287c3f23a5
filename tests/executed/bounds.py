"""Numbers in float64 with how far a GPU's may lie from them.

The rules are those of docs/numerics.md: a float32 sum of n roundings is within gamma(n) = n u /
(1 - n u) of the exact one relative to sum |x| |w| (Higham, *Accuracy and Stability of Numerical
Algorithms*, 3.1), u = 2^-24; rounding to 16 bits adds v of the result (2^-8 in bfloat16, 2^-11 in
float16) and half of float16's smallest number, 2^-25.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

U = 2.0**-24
UNITS = {"bfloat16": (2.0**-8, 0.0), "float16": (2.0**-11, 2.0**-25), "float32": (U, 0.0)}
_SILU_SLOPE = 1.1
_SILU_STEPS = 16
"""Roundings of silu: exponential, sum and quotient of 2 units each, and the products around."""


@dataclasses.dataclass(frozen=True)
class Bounded:
    """float64 arrays: exact values, and the most by which computed ones differ."""

    value: np.ndarray
    error: np.ndarray

    @classmethod
    def multiply(cls, x: np.ndarray, weight: np.ndarray, roundings: int, rounded: str) -> Bounded:
        """x [M, K] @ weight [N, K].T in float32.

        `roundings`: that a term passes, the scale among them; `rounded`: "" or the dtype that each
        weight is rounded to beforehand, from float32.
        """
        x, weight = x.astype(np.float64), weight.astype(np.float64)
        magnitude = np.abs(x) @ np.abs(weight).T
        gamma = roundings * U / (1 - roundings * U)
        error = gamma * magnitude
        if rounded:
            v, tiny = UNITS[rounded]
            change = (v + 2 * U) * magnitude + tiny * np.abs(x).sum(1, keepdims=True)
            error = error + (1 + gamma) * change
        return cls(x @ weight.T, error)

    def choose(self, rows: np.ndarray) -> Bounded:
        """Some rows."""
        return Bounded(self.value[rows], self.error[rows])

    def add(self, bias: np.ndarray) -> Bounded:
        """In float32."""
        return Bounded(self.value + bias, self.error)._round(U)

    def times(self, factor: np.ndarray) -> Bounded:
        """In float32, by numbers without an error."""
        return Bounded(self.value * factor, self.error * np.abs(factor))._round(U)

    def gate(self, up: Bounded) -> Bounded:
        """silu(self) * up in float32."""
        g, e = self.value, self.error
        silu = g / (1 + np.exp(-g))
        error = _SILU_SLOPE * e + _SILU_STEPS * U * np.abs(silu)
        largest = np.abs(up.value) + up.error
        return Bounded(silu * up.value, error * largest + np.abs(silu) * up.error)._round(U)

    def square(self) -> Bounded:
        """max(self, 0)^2 in float32."""
        positive = np.maximum(self.value, 0)
        return Bounded(positive**2, (2 * positive + self.error) * self.error)._round(U)

    def normalise(self, weight: np.ndarray, eps: float, kind: str, dtype) -> Bounded:
        """The norm of `pallas_kernels.formulas.norms` over the last axis, in a 16-bit dtype.

        An error e of x changes x / size by e / size, and size by at most the root mean square of e.
        Squares are summed as a tree, so the float32 factor has at most 40 units; then one rounding
        or, if the normalised numbers are rounded by themselves, two. A kernel may also go on with
        what it had before it rounded x.
        """
        if kind == "centered":
            return self._center().normalise(weight, eps, "wide", dtype)
        wide = weight.astype(np.float64) + (kind == "offset")
        size = np.sqrt(np.mean(self.value**2, axis=-1, keepdims=True) + eps)
        moved = np.sqrt(np.mean(self.error**2, axis=-1, keepdims=True)) / size
        normal = self.value / size
        error = (self.error / size + np.abs(normal) * moved) / (1 - moved)
        found = Bounded(normal, error)._round(40 * U)
        found = found.round_to(dtype) if kind == "rounded" else found
        return Bounded(found.value * wide, found.error * np.abs(wide)).round_to(dtype)

    def _center(self) -> Bounded:
        """The difference from the mean over the last axis, whose sum has at most 40 units, too."""
        moved = self.error.mean(-1, keepdims=True)
        moved = moved + 40 * U * (np.abs(self.value).mean(-1, keepdims=True) + moved)
        exact = self.value - self.value.mean(-1, keepdims=True)
        return Bounded(exact, self.error + moved)._round(U)

    def round_to(self, dtype) -> Bounded:
        """Once, to a 16-bit dtype; float32 stays."""
        v, tiny = UNITS[np.dtype(dtype).name]
        return self if np.dtype(dtype) == np.float32 else self._round(v, tiny)

    def _round(self, v: float, tiny: float = 0.0) -> Bounded:
        return Bounded(self.value, self.error + v * (np.abs(self.value) + self.error) + tiny)

    def measure(self, found: np.ndarray) -> float:
        """The worst error over its bound; infinity if a number is missing."""
        difference = np.abs(found.astype(np.float64) - self.value)
        with np.errstate(invalid="ignore", divide="ignore"):
            worst = np.where(difference == 0, 0.0, difference / self.error)
        return float(np.max(np.where(np.isnan(worst), np.inf, worst), initial=0.0))

    def is_exactly(self, found: np.ndarray) -> bool:
        """Whether `found` has the bits of the value rounded once to its dtype."""
        near = self.value.astype(np.float32)  # whole sums have few bits, so this rounds nothing
        if not np.array_equal(near, self.value):
            raise ValueError("a sum that should be whole has more bits than float32")
        return bool(np.array_equal(near.astype(found.dtype), found))


def find_rounding(dtype: str, scale_on: str, is_mixed: bool) -> str:
    """The dtype that a kernel rounds its weights to, "" if it uses them as they are."""
    return dtype if scale_on == "weight" or is_mixed else ""


DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
