"""Every tile that `make gpu-check` compiles computes the product, interpreted, within its bound."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import pytest

from pallas_kernels.device import Device
from pallas_kernels.matmul import quant_matmul
from pallas_kernels.schedule import Tiles, choose, fix_schedule
from tests import gpu_aot
from tests.gpu_check import list_all
from tests.grids import sample
from tests.pallas_kernels.exact import assert_exact, make_case
from tests.pallas_kernels.products import make_x

_SHAPE = (130, 640)
_MAX_ROWS = 70


def _list_schedules() -> list:
    """(schedule, bits, dtype, group, M) of all cases, equal ones once."""
    found: dict[tuple, None] = {}
    for case in list_all():
        target = gpu_aot.TARGETS[case.arch]
        device = Device(target.device_kind, target.cores)
        schedule = choose(case.spec, case.tokens, case.dtype, case.dtype, device)
        if isinstance(schedule, Tiles) and schedule.splits > 1:
            # 640 features are 5 steps of 128: the splits differ in length
            schedule = dataclasses.replace(schedule, splits=2)
        group = case.group_size if case.group_size <= 128 else _SHAPE[1]
        found[schedule, case.bits, case.dtype, group, min(case.tokens, _MAX_ROWS)] = None
    return sample(found, every=15)


@functools.cache
def _make(bits: int, dtype: str, group: int):
    return make_case(_SHAPE, group, bits, symmetric=False, scale_dtype=jnp.dtype(dtype))


@pytest.mark.parametrize(("schedule", "bits", "dtype", "group", "tokens"), _list_schedules())
def test_product_is_within_the_bound_of_its_schedule(schedule, bits, dtype, group, tokens):
    case, x = _make(bits, dtype, group), make_x((tokens, _SHAPE[1]), jnp.dtype(dtype))
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
