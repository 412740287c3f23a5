"""Products of few features are the same on a GPU, where they are no product but a reduction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxwna16.models.parts.layers import multiply
from tests.pallas_kernels.products import make_x

U = 2.0**-24


def run_for_gpu(x, weight, monkeypatch):
    """What a GPU would run, on this machine."""
    take = lambda *operands, cuda, default: cuda(*operands)  # noqa: E731
    monkeypatch.setattr(lax, "platform_dependent", take)
    return jax.jit(multiply)(x, weight)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("lead", [(1, 1), (3, 1), (2, 5)])
def test_a_reduction_gives_the_sums_of_the_product(lead, dtype, monkeypatch):
    x, weight = make_x((*lead, 160), dtype), make_x((48, 160), dtype, seed=2)
    exact, size = (
        np.einsum("...k,nk->...n", f(np.asarray(x, np.float64)), f(np.asarray(weight, np.float64)))
        for f in (np.asarray, np.abs)
    )
    # gamma(K) of docs/numerics.md, and a rounding of each product
    found = run_for_gpu(x, weight, monkeypatch)
    assert found.dtype == jnp.float32
    assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= 161 * U * size)


@pytest.mark.parametrize(("rows", "features", "dots"), [(64, 64, 0), (65, 8, 1), (8, 65, 1)])
def test_only_a_narrow_product_of_few_rows_is_one(rows, features, dots):
    x, weight = jnp.ones((rows, 32)), jnp.ones((features, 32))
    lowered = jax.jit(multiply).trace(x, weight).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("dot_general") == dots
