"""The kernel that ends a product, interpreted, against float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formulas.norms import KINDS, Norm, Onto
from pallas_kernels.tiles.ahead import fix_ahead
from pallas_kernels.triton.parts import Parts
from pallas_kernels.triton.step.add_norm import Experts, finish_rows
from tests.grids import cover
from tests.jaxprs import find_kernels

U = 2.0**-24
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
EPS = 1e-5


@functools.partial(jax.jit, static_argnames="interpret")
def run(product, onto, experts=None, interpret=True):
    return finish_rows(product, onto, experts, interpret=interpret)


def wide(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def normalise(x: np.ndarray, norm: Norm, unit: float) -> tuple[np.ndarray, np.ndarray]:
    """The norm in float64, and how far a kernel's may lie from it.

    Squares are summed as a tree of 2^k terms, so the factor's relative error is at most half of
    (k + 2) u, and a few units for the quotient and the root; 40 u covers rows of up to 2^16. Then
    comes one rounding to 16 bits or, if the normalised numbers are rounded by themselves, two. One
    more is that of x: XLA may go on with what it rounded, or with what it had before. Of a centered
    norm, errors are relative to both terms of the difference.
    """
    weight, size = wide(norm.weight) + (norm.kind == "offset"), np.abs(x)
    if norm.kind == "centered":
        size = size + size.mean(axis=-1, keepdims=True)
        x = x - x.mean(axis=-1, keepdims=True)
    scale = weight / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + norm.eps)
    roundings = 3 if norm.kind == "rounded" else 2
    error = size * np.abs(scale) * ((1 + unit) ** roundings * (1 + 40 * U) - 1)
    return x * scale, error + 2.0**-24


def add(y: np.ndarray, error: np.ndarray, onto: Onto, unit: float):
    """The stream in float64, and its bound: y rounded, its late norm, its factor, the sum rounded.

    A norm divides by at least half of its row's size here, so an error e of y is at most
    4 |weight| max(e) / size behind it; of a centered one twice that, since e is in the mean, too.
    """
    error = error + unit * np.abs(y) + 2.0**-25
    if onto.late is not None:
        is_centered = onto.late.kind == "centered"
        size = y.std(-1, keepdims=True) if is_centered else np.sqrt((y**2).mean(-1, keepdims=True))
        weight = np.abs(wide(onto.late.weight)) + (onto.late.kind == "offset")
        weight = weight * (1 + is_centered)
        y, own = normalise(y, onto.late, unit)
        error = own + 4 * weight * error.max(-1, keepdims=True) / size
    if onto.factor != 1:
        y, error = y * onto.factor, error * onto.factor
        error = error + unit * (np.abs(y) + error) + 2.0**-25
    exact = wide(onto.residual) + y
    return exact, error + unit * (np.abs(exact) + error) + 2.0**-25


def assert_right(outputs, y: np.ndarray, error: np.ndarray, onto: Onto) -> None:
    """Both outputs; the early norm is that of the stream which the kernel itself stored."""
    x, normalised = outputs
    unit = UNIT[x.dtype.name]
    exact, bound = add(y, error, onto, unit)
    assert np.all(np.abs(wide(x) - exact) <= bound)
    if onto.early is None:
        assert normalised is None
    else:
        exact, bound = normalise(wide(x), onto.early, unit)
        assert np.all(np.abs(wide(normalised) - exact) <= bound)


def draw(*shape: int, dtype="float32", seed=0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def make_norm(features: int, kind: str | None, dtype: str, seed: int) -> Norm | None:
    return kind and Norm(draw(features, dtype=dtype, seed=seed), EPS, kind)


@pytest.mark.parametrize(
    ("dtype", "n", "parts", "late", "early", "bias", "factor"),
    cover(
        ("bfloat16", "float16"),
        (64, 96, 320),
        (1, 2, 5),
        (None, *KINDS),
        (*KINDS, None),
        ((True, 1.0), (False, 0.22), (True, 0.22)),
    ),
)
def test_splits_bias_stream_and_norms_are_added_in_one_kernel(
    dtype, n, parts, late, early, bias, factor
):
    sums = draw(parts, 3, n, dtype=dtype if parts == 1 else "float32")
    added = draw(n, dtype=dtype, seed=2) if bias else None
    norms = make_norm(n, late, dtype, 3), make_norm(n, early, dtype, 4)
    onto = Onto(draw(3, n, dtype=dtype, seed=5), *norms, factor=factor)
    terms = [wide(sums), wide(added)[None, None]] if bias else [wide(sums)]
    y = sum(term.sum(0) for term in terms)
    # gamma(n) of docs/numerics.md: at most six additions
    error = 7 * U * sum(np.abs(term).sum(0) for term in terms)
    assert_right(run(Parts(sums, added), onto), y, error, onto)


@pytest.mark.parametrize("shared", ["none", "shared", "gated"])
@pytest.mark.parametrize("parts", [1, 3])
def test_experts_are_added_with_the_shared_ones_and_absent_ones_are_not(shared, parts):
    tokens, top_k, n, dtype = 3, 4, 96, "bfloat16"
    sums = draw(parts, tokens * top_k, n)
    held = 6
    local = np.random.default_rng(3).integers(0, held + 2, tokens * top_k).astype(np.int32)
    # what stands in rows that no expert wrote must not matter
    sums = jnp.where((jnp.asarray(local) < held)[None, :, None], sums, jnp.nan)
    beside = draw(tokens, n, dtype=dtype, seed=6) if shared != "none" else None
    gate = draw(tokens, 1, dtype=dtype, seed=7) if shared == "gated" else None
    onto = Onto(draw(tokens, n, dtype=dtype, seed=5), early=make_norm(n, "rounded", dtype, 4))
    terms = np.nan_to_num(wide(sums)).reshape(parts, tokens, top_k, n)
    y, size = terms.sum((0, 2)), np.abs(terms).sum((0, 2))
    if beside is not None:
        factor = 1.0 if gate is None else 1 / (1 + np.exp(-wide(gate)))
        y, size = y + wide(beside) * factor, size + np.abs(wide(beside)) * factor
    # parts, experts and the shared ones are 13 additions; the sigmoid has 16 units
    error = 30 * U * size
    experts = Experts(jnp.asarray(local), held, beside, gate)
    assert_right(run(Parts(sums), onto, experts), y, error, onto)


def test_equal_rows_give_equal_bits_whatever_stands_beside_them():
    sums, residual = draw(4, 1, 320), draw(1, 320, dtype="bfloat16")
    early = make_norm(320, "offset", "bfloat16", 4)
    alone = run(Parts(sums), Onto(residual, early=early))
    sums, residual = (
        jnp.concatenate([draw(*x.shape, dtype=x.dtype, seed=9), x], -2) for x in (sums, residual)
    )
    both = run(Parts(sums), Onto(residual, early=early))
    for one, many in zip(alone, both, strict=True):
        np.testing.assert_array_equal(one[0], many[1])


@pytest.mark.parametrize("size", [1 << 15, 3 << 15, 1 << 20])
def test_words_read_ahead_change_nothing(size):
    sums, residual = draw(4, 2, 320), draw(2, 320, dtype="bfloat16")
    early = make_norm(320, "rounded", "bfloat16", 4)
    words = tuple(jnp.zeros((count, 2, 64, 32), jnp.uint16) for count in (5, 16))

    def finish(ahead):
        with fix_ahead(size):
            onto = Onto(residual, early=early, ahead=ahead)
            return finish_rows(Parts(sums), onto, interpret=True)

    for one, other in zip(finish(words), finish(()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_programs_without_a_row_read_the_next_words_in_their_order():
    words = tuple(jnp.zeros((count, 2, 64, 32), jnp.uint16) for count in (5, 16))
    onto = Onto(draw(2, 320, dtype="bfloat16"), ahead=words)
    grids = {}
    for size in (0, 1 << 15, 2 << 15, 3 << 15, 1 << 20):
        with fix_ahead(size):
            run = functools.partial(finish_rows, interpret=False)
            [kernel] = find_kernels(run, Parts(draw(4, 2, 320)), onto)
        grids[size >> 15] = kernel.params["grid_mapping"].grid
    # 20,480 words have one whole chunk of 32 KiB, 65,536 have four
    assert grids == {0: (2,), 1: (3,), 2: (4,), 3: (5,), 32: (7,)}
