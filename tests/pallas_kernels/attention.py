"""One step of decode attention: drawn arguments, and what must come out of them, with a bound.

The bound follows the kernel from the products on. Let u = 2^-24 and v the unit of the 16-bit dtype.

* The sum of a product's parts is added in order in float32 and rounded: NumPy gives the same bits.
* Norm: a mean of D squares, its root and a product are D + 8 roundings. What is rounded to 16 bits
  on the way is at most v away for each rounding. Rotation: v for each product (cosines of 16 bits)
  and v for the sum. Without norms and with cosines of 16 bits there is no error: the products are
  exact in float32, so NumPy gives the bits.
* A score is a sum of D products in float32, D + 4 roundings with the scale, and what the errors of
  query and key make of it. Call the largest error of a head's scores e, and the largest score t.
* A softcap c has a slope of at most 1. Its power, sum and quotient, each times 2 c, have 16 u c.
* A weight is 2^(score - largest). The largest is the same number above and below, so it adds no
  error but that of the difference, 3 u t; the power has 4 u. So weights relative to their sum are
  within a factor exp(2 (e + 3 u t + 4 u)).
* Weights are rounded to 16 bits above, not below: v, and in float16 half of the smallest number.
* Sums of n slots, moved to a new largest score with each block and split: n + 3 (blocks + splits)
  roundings, above and below.
* The mean is rounded. A gate is a sigmoid (8 roundings), rounded, and a product, rounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels.tiles.attention.decode_rules import Division
from pallas_kernels.triton.step.slots import LOG2_E
from tests.executed.bounds import Bounded

U = 2.0**-24
UNITS = {"bfloat16": (2.0**-8, 0.0), "float16": (2.0**-11, 2.0**-25)}
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Step:
    """Sizes and kinds of one step.

    Attributes:
      positions: of each row; an inactive one is None.
      norm: "" for none.
      paired: neighbouring features are rotated together, and not halves.
      norms_last: heads are normalised after they are rotated.
      wide: cosines and sines are float32.
      whole: whole numbers, of which every step of the computation is exact: rotations are by
        quarters of a turn, and weights are powers of two.
      paired: neighbouring features are rotated together, and not halves.
      scales: queries are multiplied by a number of each row, and rounded.
    """

    head_dim: int
    group: int
    positions: tuple[int | None, ...]
    slots: int
    kv_heads: int = 1
    rotated: int = 0
    window: int | None = None
    norm: str = ""
    gated: bool = False
    bias: bool = False
    wide: bool = False
    parts: int = 1
    dtype: str = "bfloat16"
    whole: bool = False
    paired: bool = False
    softcap: float | None = None
    norms_last: bool = False
    scales: bool = False

    @property
    def np_dtype(self) -> np.dtype:
        return _DTYPES[self.dtype]

    @property
    def scale(self) -> float:
        return float(np.log(2)) if self.whole else self.head_dim**-0.5

    @property
    def active(self) -> np.ndarray:
        return np.array([p is not None for p in self.positions], np.int32)

    def find_seen(self, row: int) -> range:
        """The slots that a row reads, written once more; the new token's own is not among them."""
        position = self.positions[row]
        if position is None:
            return range(0)
        return range(max(0, position + 1 - (self.window or position + 1)), position)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Of `attend_token`, as NumPy arrays; sums and biases of q, k and v."""

    sums: tuple[np.ndarray, np.ndarray, np.ndarray]
    biases: tuple[np.ndarray | None, ...]
    weights: tuple[np.ndarray | None, np.ndarray | None]
    rotation: tuple[np.ndarray, ...]
    position: np.ndarray
    active: np.ndarray
    caches: tuple[np.ndarray, np.ndarray]


def draw(step: Step, seed: int = 0) -> Arguments:
    """Arguments of a step; of inactive rows, every other position lies outside of the cache."""
    rng, batch, dim = np.random.default_rng(seed), len(step.positions), step.head_dim
    dtype, heads = step.np_dtype, step.kv_heads * step.group
    sizes = (heads * dim * (2 if step.gated else 1), step.kv_heads * dim, step.kv_heads * dim)

    def normal(*shape: int) -> np.ndarray:
        # few ones in whole numbers: their scores stay small, and sums of powers of two exact
        whole = rng.integers(-1, 2, shape) * (rng.random(shape) < 2 / dim**0.5)
        return (whole if step.whole else rng.standard_normal(shape)).astype(np.float32)

    # queries are large, so that few slots have most of the weight and each of them counts
    scales = (1, 1, 1) if step.whole else (3, 1, 1)
    sums = [
        normal(step.parts, batch, n) * np.float32(s / (1 if step.whole else step.parts**0.5))
        for n, s in zip(sizes, scales, strict=True)
    ]
    if step.parts == 1:
        sums = [part.astype(dtype) for part in sums]
    angles = rng.uniform(-20, 20, (batch, step.rotated // 2))
    rotation = [np.cos(angles), np.sin(angles)]
    if step.whole:
        rotation = [np.round(f(np.pi / 2 * np.round(angles))) for f in (np.cos, np.sin)]
    table = np.dtype(np.float32) if step.wide else dtype
    scale = [rng.uniform(1, 1.4, batch).astype(dtype)] if step.scales else []
    anywhere = (step.slots + 100, step.slots // 2)
    lines = (batch * step.kv_heads, step.slots, dim)
    return Arguments(
        tuple(sums),
        tuple(normal(n).astype(dtype) if step.bias else None for n in sizes),
        tuple(normal(dim).astype(dtype) if step.norm else None for _ in range(2)),
        (*(t.astype(table) for t in rotation), *scale),
        np.array(
            [anywhere[i % 4 // 2] if p is None else p for i, p in enumerate(step.positions)],
            np.int32,
        ),
        step.active,
        tuple(normal(*lines).astype(dtype) for _ in range(2)),
    )


def add_up(sums: np.ndarray, bias: np.ndarray | None, dtype) -> np.ndarray:
    """The parts of a product in order, in float32, rounded: [B, N]."""
    total = sums[0].astype(np.float32)
    for part in [*sums[1:], *([] if bias is None else [bias.astype(np.float32)[None]])]:
        total = total + part
    return total.astype(dtype)


def expect_heads(
    step: Step, x: np.ndarray, weight: np.ndarray | None, rotation: Sequence[np.ndarray]
) -> Bounded:
    """Heads [B, heads, D] of 16 bits, normalised and rotated, or rotated and normalised."""
    exact = Bounded(x.astype(np.float64), np.zeros(x.shape))
    if weight is None:
        return _rotate(exact, rotation, step)
    wide = weight.astype(np.float64)
    if step.norms_last:
        return _normalise(_rotate(exact, rotation, step), wide, step)
    return _rotate(_normalise(exact, wide, step), rotation, step)


def _rotate(exact: Bounded, rotation: Sequence[np.ndarray], step: Step) -> Bounded:
    cos, sin = (t.astype(np.float64)[:, None, :] for t in rotation)
    half, order = step.rotated // 2, np.arange(exact.value.shape[-1])
    turned = order[: 2 * half].reshape(-1, 2).T if step.paired else order[: 2 * half].reshape(2, -1)
    order[: 2 * half] = turned.ravel()  # of the first half, then of the second, then what rests
    first, second, rest = (
        Bounded(exact.value[..., part], exact.error[..., part])
        for part in np.split(order, [half, 2 * half])
    )
    turned = [_turn(first, second, cos, -sin, step), _turn(second, first, cos, sin, step)]
    both, back = [*turned, rest], np.argsort(order)
    return Bounded(
        *(np.concatenate([getattr(b, n) for b in both], -1)[..., back] for n in ("value", "error"))
    )


def _normalise(x: Bounded, weight: np.ndarray, step: Step) -> Bounded:
    square = (x.value**2).mean(-1, keepdims=True) + EPS
    value = x.value / np.sqrt(square)
    # what is off in one feature moves it, and through the mean all others
    moved = (np.abs(x.value) * x.error).mean(-1, keepdims=True) / square
    error = np.abs(value) * ((step.head_dim + 8) * U + 2 * moved) + 2 * x.error / np.sqrt(square)
    found = Bounded(value, error)
    if step.norm == "rounded":
        found = found.round_to(step.np_dtype)
    return found.times(1 + weight if step.norm == "offset" else weight).round_to(step.np_dtype)


def _turn(x: Bounded, other: Bounded, cos: np.ndarray, sin: np.ndarray, step: Step) -> Bounded:
    """x cos + other sin; to the bit where both are exact and products are rounded."""
    if not step.wide and not (x.error.any() or other.error.any()):
        products = [(a.value * t).astype(step.np_dtype) for a, t in ((x, cos), (other, sin))]
        total = sum(p.astype(np.float32) for p in products).astype(step.np_dtype)
        return Bounded(total.astype(np.float64), np.zeros(total.shape))
    products = [
        Bounded(a.value * t, a.error * np.abs(t)).round_to(np.float32 if step.wide else step.dtype)
        for a, t in ((x, cos), (other, sin))
    ]
    total = Bounded(*(sum(getattr(p, n) for p in products) for n in ("value", "error")))
    # in float32 both products and their sum are rounded
    size = 3 * U * sum(np.abs(p.value) for p in products) if step.wide else 0.0
    return Bounded(total.value, total.error + size).round_to(step.np_dtype)


@dataclasses.dataclass(frozen=True)
class Expected:
    """Results [B, H, D], means before rounding and gate, new keys and values [B, kv_heads, D]."""

    result: Bounded
    mean: Bounded
    key: Bounded
    value: np.ndarray


def expect(step: Step, given: Arguments, division: Division) -> Expected:
    """What must come out; rows that are not active are 0."""
    batch, dim = len(step.positions), step.head_dim
    q, k, v = (
        add_up(sums, bias, step.np_dtype)
        for sums, bias in zip(given.sums, given.biases, strict=True)
    )
    q = q.reshape(batch, -1, dim * (2 if step.gated else 1))
    *tables, scale = given.rotation if step.scales else (*given.rotation, None)
    queries = expect_heads(step, q[..., :dim], given.weights[0], tables)
    keys = expect_heads(step, k.reshape(batch, -1, dim), given.weights[1], tables)
    if scale is not None:
        queries = queries.times(scale.astype(np.float64)[:, None, None]).round_to(step.np_dtype)
    values = v.reshape(batch, -1, dim)
    found = Bounded(np.zeros(q[..., :dim].shape), np.zeros(q[..., :dim].shape))
    for row, head in np.ndindex(found.value.shape[:2]):
        if step.positions[row] is None:
            continue
        kv_head = head // step.group
        line, seen = row * step.kv_heads + kv_head, step.find_seen(row)
        old_k, old_v = (cache[line, seen].astype(np.float64) for cache in given.caches)
        key = Bounded(
            np.vstack([old_k, keys.value[row, kv_head]]),
            np.vstack([np.zeros(old_k.shape), keys.error[row, kv_head]]),
        )
        query = Bounded(queries.value[row, head], queries.error[row, head])
        value = np.vstack([old_v, values[row, kv_head].astype(np.float64)])
        found.value[row, head], found.error[row, head] = attend_exactly(
            query, key, value, step.scale, step.dtype, division, step.softcap
        )
    result = found.round_to(step.np_dtype)
    if step.gated:
        result = expect_gate(result, q[..., dim:].astype(np.float64), step.np_dtype)
    return Expected(result, found, keys, values)


def expect_gate(found: Bounded, gate: np.ndarray, dtype: np.dtype) -> Bounded:
    """Times the sigmoid of a gate of 16 bits."""
    sigmoid = 1 / (1 + np.exp(-gate))
    sigmoid = Bounded(sigmoid, 8 * U * sigmoid).round_to(dtype)
    error = found.error * (sigmoid.value + sigmoid.error) + np.abs(found.value) * sigmoid.error
    return Bounded(found.value * sigmoid.value, error).round_to(dtype)


def attend_exactly(
    query: Bounded,
    key: Bounded,
    value: np.ndarray,
    scale: float,
    dtype: str,
    division: Division,
    softcap: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of n values [n, D] for one query, before its rounding, and its error."""
    unit, tiny = UNITS[dtype]
    size, large = np.abs(key.value) + key.error, np.abs(query.value) + query.error
    products = key.value @ query.value
    error = np.abs(key.value) @ query.error + key.error @ large
    error = scale * (error + _gamma(query.value.size + 4) * (size @ large))
    # in powers of two, and divided last: to the bit for whole numbers
    scores = scale * products
    powers = np.exp2(scale * LOG2_E * (products - products.max()))
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
        powers = np.exp(scores - scores.max())
        error = error + 16 * U * softcap
    weights = powers / powers.sum()
    drift = np.expm1(2 * (error.max() + 3 * U * np.abs(scores).max() + 4 * U))
    count = len(scores) + 3 * (len(scores) // division.block + 2 + division.splits)
    share = (1 + drift) * (1 + unit) * (1 + 2 * _gamma(count)) - 1
    magnitude = np.abs(value)
    return powers @ value / powers.sum(), share * (weights @ magnitude) + tiny * magnitude.sum(0)


def _gamma(count: int) -> float:
    return count * U / (1 - count * U)


def poison(step: Step, given: Arguments, filler: float) -> Arguments:
    """The same with every slot that is not seen full of `filler`."""
    caches = []
    for cache in given.caches:
        changed = np.full_like(cache, filler)
        for line in range(len(cache)):
            seen = step.find_seen(line // step.kv_heads)
            changed[line, seen] = cache[line, seen]
        caches.append(changed)
    return dataclasses.replace(given, caches=tuple(caches))


def to_float(array: np.ndarray) -> np.ndarray:
    """float64, also of bfloat16."""
    return array.astype(np.float64)


def name_arguments(given: Arguments) -> tuple[Any, ...]:
    """As a tree that a jitted function takes."""
    return tuple(getattr(given, field.name) for field in dataclasses.fields(given))
