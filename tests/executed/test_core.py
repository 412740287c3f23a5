"""A core of the matrix, executed; `make gpu-execute` runs all of it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.executed.cases import ARCHS, list_all, list_core, name
from tests.executed.compiled import compile_cases


@pytest.fixture(scope="module")
def launches(request):
    """Of the cases that this session runs."""
    here = [item for item in request.session.items if item.path == request.path]
    calls = [item.callspec for item in here if hasattr(item, "callspec")]
    return compile_cases("list_core", {call.params["case"] for call in calls})


@pytest.mark.parametrize("case", list_core(), ids=lambda case: f"{case.arch} {name(case)}")
def test_kernels_compute_what_they_must_and_break_no_rule(launches, case):
    work = case.prepare()
    outputs, _, early = work.run_noting_early(launches[case])
    assert work.measure(outputs) <= 1
    # see EarlyRead: XLA's own doing, and harmless with the assembler that comes with it
    assert not early or (case.arch == "sm_100a" and jax.__version_info__ >= (0, 12))


@pytest.mark.parametrize(
    "case", [case for case in list_core() if getattr(case, "whole", False)], ids=str
)
def test_whole_numbers_give_the_bits_of_the_interpreted_kernel(launches, case):
    work = case.prepare()
    outputs, *_ = work.run_noting_early(launches[case])
    for executed, interpreted in zip(outputs, work.interpret(), strict=True):
        np.testing.assert_array_equal(executed, interpreted)


def test_every_architecture_and_kind_is_there():
    for cases in (list_core(), list_all()):
        assert {case.arch for case in cases} == set(ARCHS)
        assert len(set(cases)) == len(cases)
    assert {case.kind for case in list_core()} == {case.kind for case in list_all()}
    assert all(
        {c.kind for c in list_all() if c.arch == a} == {c.kind for c in list_all()} for a in ARCHS
    )
