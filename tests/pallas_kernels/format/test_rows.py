"""Rows of a packed weight are a packed weight: the same integers, scales and padding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import SpecError
from pallas_kernels.format.dequantize import dequantize
from pallas_kernels.format.quantize import quantize
from pallas_kernels.format.rows import take_rows
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import check_weights

SPEC = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=96, out_features=130)


@pytest.fixture(scope="module")
def weights() -> dict[str, jax.Array]:
    leaves = quantize(jax.random.normal(jax.random.key(0), (130, 96)), SPEC)
    return leaves | {"bias": jnp.arange(130.0)}


@pytest.mark.parametrize("rows", [[129], range(64), range(128, 130), [70, 3, 3, 0, 129] * 20])
def test_any_rows_in_any_order_are_a_weight_of_their_own(weights, rows):
    rows = np.array(rows)
    taken, spec = (
        take_rows(weights, SPEC, rows),
        dataclasses.replace(SPEC, out_features=len(rows)),
    )
    check_weights(taken, spec)
    np.testing.assert_array_equal(dequantize(taken, spec), dequantize(weights, SPEC)[rows])
    np.testing.assert_array_equal(taken["bias"], rows)
    padding = [taken[name][:, len(rows) :] for name in ("scale", "zero_point")]
    tiles = (
        np.asarray(taken["packed"]).transpose(0, 2, 1, 3).reshape(-1, *taken["packed"].shape[1::2])
    )
    assert not any(np.asarray(part).any() for part in [*padding, tiles[len(rows) :]])


def test_arrays_of_another_weight_are_refused(weights):
    with pytest.raises(SpecError, match="packed has shape"):
        take_rows(weights, dataclasses.replace(SPEC, out_features=200), np.array([0]))
