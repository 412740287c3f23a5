"""Every tile that `make gpu-check` compiles computes the product, interpreted, within its bound."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import pytest

from pallas_kernels.matmul import quant_matmul
from pallas_kernels.tiles.dense_rules import choose, fix_schedule
from pallas_kernels.tiles.tiles import Tiles
from tests.gpu_cases import Case, list_all
from tests.grids import sample
from tests.pallas_kernels.exact import assert_exact, make_case
from tests.pallas_kernels.products import make_x

_FEATURES = 130
_MAX_ROWS = 70


def _list_schedules() -> list:
    """(schedule, bits, dtype, scale dtype, group, K, M) of all cases, equal ones once."""
    found: dict[tuple, None] = {}
    for case in list_all():
        if not isinstance(case, Case):
            continue
        dtypes = (case.dtype, case.scale_dtype)
        schedule = choose(case.spec, case.tokens, *dtypes, case.device)
        if isinstance(schedule, Tiles) and schedule.splits > 1:
            # 640 features are 5 steps of 128: the splits differ in length
            schedule = dataclasses.replace(schedule, splits=2)
        features = 480 if 640 % case.group_size else 640
        group = case.group_size if case.group_size <= 128 else features
        tokens = min(case.tokens, _MAX_ROWS)
        found[schedule, case.bits, *dtypes, group, features, tokens] = None
    return sample(found, every=20)


@functools.cache
def _make(bits: int, scale_dtype: str, group: int, features: int):
    shape = (_FEATURES, features)
    return make_case(shape, group, bits, symmetric=False, scale_dtype=jnp.dtype(scale_dtype))


@pytest.mark.parametrize(
    ("schedule", "bits", "dtype", "scale_dtype", "group", "features", "tokens"), _list_schedules()
)
def test_product_is_within_the_bound_of_its_schedule(
    schedule, bits, dtype, scale_dtype, group, features, tokens
):
    case = _make(bits, scale_dtype, group, features)
    x = make_x((tokens, features), jnp.dtype(dtype))
    with fix_schedule(schedule):
        out = quant_matmul(x, case.weights, case.spec, backend="triton")
    fused = isinstance(schedule, Tiles)
    assert_exact(
        out,
        x,
        case,
        splits=schedule.splits if fused else 1,
        scale_on=schedule.scale_on if fused else "weight",
    )
