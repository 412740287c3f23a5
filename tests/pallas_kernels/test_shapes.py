"""`quant_matmul` on awkward shapes, on every backend, with the schedule that a GPU would choose."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import quant_matmul
from pallas_kernels.tiles.dense_rules import fix_schedule
from pallas_kernels.tiles.tiles import PREFILL
from tests.grids import sample
from tests.pallas_kernels.products import assert_close, make_weights, make_x

_ROWS = (0, 1, 7, 8, 9, 63, 64, 65, 1000)
_COLUMNS = (1, 8, 63, 830, 4096)
_FEATURES = {32: 32, 33: -1, 100: -1, 544: 32, 4096: 128}


def _list_shapes():
    """Every N with every K, but for the largest with few rows; every M in each third of them."""
    for i, (n, k) in enumerate(itertools.product(_COLUMNS, _FEATURES)):
        rows = _ROWS[(i + i // 3) % len(_ROWS)]
        large = n * k > 4_000_000
        yield (min(rows, 64) if large else rows, n, k)


_multiply = jax.jit(quant_matmul, static_argnames=("spec", "backend"))


@functools.cache
def _make(bits: int, n: int, k: int):
    return make_weights(bits, n, k, _FEATURES[k], scale_dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("backend", "tokens", "n", "k"),
    [
        *sample((("triton", *shape) for shape in _list_shapes()), every=3),
        *sample((("xla", *shape) for shape in _list_shapes()), every=7),
    ],
)
def test_product_of_every_shape_is_within_the_bound(tokens, n, k, backend):
    bits = 8 if n in (8, 830) else 4
    spec, weights = _make(bits, n, k)
    x = make_x((tokens, k), jnp.bfloat16)
    out = _multiply(x, weights, spec=spec, backend=backend)
    assert_close(out, x, weights, spec, exact_scale=backend == "triton")


@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_expand_the_weight_and_memory_forbids_it(bits):
    spec, weights = make_weights(bits, 70, 96, scale_dtype=jnp.bfloat16)
    weights["bias"] = make_x((70,), jnp.bfloat16, 3)
    x = make_x((1030, 96), jnp.bfloat16)
    expanded = quant_matmul(x, weights, spec, backend="triton")
    frugal = quant_matmul(x, weights, spec, backend="triton", prefer="memory")
    for out in (expanded, frugal):
        assert_close(out, x, weights, spec, exact_scale=True, bias=weights["bias"])
    with fix_schedule(PREFILL):
        again = quant_matmul(x, weights, spec, backend="triton")
    np.testing.assert_array_equal(expanded, again)
    assert not np.array_equal(expanded, frugal)
