"""Attention of a piece in float64, with how far a kernel's numbers may lie from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from tests.executed.bounds import DTYPES, UNITS, Bounded, U

LEAST_BLOCK = 16
"""Slots of the smallest block: more of them are fewer roundings."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Queries, keys and values of a piece; arguments as `pallas_kernels.step.attention.attend`."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    start: np.ndarray
    count: np.ndarray
    window: int | None

    def find_seen(self, row: int, query: int) -> slice:
        """The slots that a query sees."""
        position = int(self.start[row]) + query
        first = 0 if self.window is None else max(0, position - self.window + 1)
        return slice(first, position + 1)

    def poison(self) -> Piece:
        """The same with NaN in every slot that no query of its row sees."""
        k, v = self.k.copy(), self.v.copy()
        heads = len(k) // len(self.q)
        for row, count in enumerate(self.count):
            seen = np.zeros(k.shape[1], bool)
            for query in range(count):
                seen[self.find_seen(row, query)] = True
            for array in (k, v):
                array[row * heads : (row + 1) * heads, ~seen] = np.nan
        return dataclasses.replace(self, k=k, v=v)

    def is_token(self) -> np.ndarray:
        """bool [B, S], which queries are no padding."""
        return np.arange(self.q.shape[1])[None, :] < self.count[:, None]


def draw_piece(
    steps: int,
    heads: tuple[int, int],
    head_dim: int,
    slots: int,
    places: Sequence[tuple[int, int]],
    *,
    window: int | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> Piece:
    """Normal numbers.

    Args:
      heads: of queries and of keys.
      places: start and count of each row.
    """
    rng = np.random.default_rng(seed)
    query_heads, key_heads = heads
    start, count = np.array(places, np.int32).T
    lines = (len(places) * key_heads, slots, head_dim)
    shapes = (len(places), steps, query_heads, head_dim), lines, lines
    q, k, v = (rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes)
    return Piece(q, k, v, start, count, window)


def attend_exactly(
    piece: Piece, scale: float | None = None, softcap: float | None = None
) -> Bounded:
    """The result [B, S, H * D], 0 for padding, and its bound for sums in float32.

    With A = sum |q k| of a slot and c = scale, a score s has an error of gamma(D) A, since products
    of 16-bit numbers are exact. Its exponent c (s - m), m the largest so far, takes c as float32,
    two products and a sum: at most 6 u c M, M the largest |s|. When m grows, all before shrinks by
    2^(c (old - new)), whose roundings add up to as much, because the differences add up to at most
    2 M, and to 4 u for each block. So each weight is right but for a factor of 1 +- e,

        e = c (gamma(D) A + 20 u M) + 4 u (blocks + 2),

    and is rounded to the dtype of v (unit v, half of float16's least number besides), while the
    sum of weights takes them unrounded. The result is the sum of p |v| with both, over the sum of
    weights with e; both sums have gamma(slots + 2 blocks). A factor has the errors of second order.

    A softcap has a slope of at most 1, so that its score has the error of the one before, and 16 u
    of the cap: those of a power, a sum and a quotient, each times twice the cap.
    """
    batch, steps, heads, head_dim = piece.q.shape
    q, k, v = (x.astype(np.float64) for x in (piece.q, piece.k, piece.v))
    group = heads // (len(k) // batch)
    value, error = (np.zeros(q.shape) for _ in range(2))
    scale = head_dim**-0.5 if scale is None else scale
    unit, tiny = UNITS[piece.q.dtype.name]
    for row, query, head in np.ndindex(batch, steps, heads):
        if query >= piece.count[row]:
            continue
        line, seen = row * (len(k) // batch) + head // group, piece.find_seen(row, query)
        keys, values, one = k[line, seen], v[line, seen], q[row, query, head]
        scores, magnitude = keys @ one, np.abs(keys) @ np.abs(one)
        scores = scale * scores
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        total, size = weights.sum(), len(scores)
        blocks = math.ceil(size / LEAST_BLOCK) + 1
        wrong = scale * _gamma(head_dim) * magnitude.max() + 20 * U * np.abs(scores).max()
        wrong += 4 * U * (blocks + 2) + 16 * U * (softcap or 0)
        relative = 2 * (wrong + _gamma(size + 2 * blocks)) + unit + 4 * U
        mixed = weights @ np.abs(values) / total
        value[row, query, head] = weights @ values / total
        error[row, query, head] = (1 + 4 * relative) * (
            relative * mixed + tiny * np.abs(values).sum(0) / total
        )
    flat = (batch, steps, heads * head_dim)
    return Bounded(value.reshape(flat), error.reshape(flat)).round_to(piece.q.dtype)


def _gamma(roundings: int) -> float:
    return roundings * U / (1 - roundings * U)
