"""The report of executed kernels, and the bounds that they are held to."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.executed.bounds import Bounded
from tests.executed.cases import list_all, name
from tests.executed.experts import group
from tests.executed.large import list_last_blocks
from tests.executed.run import Finding, merge, read_findings, write_section

_GOOD = Finding("sm_90a", "product tokens 5", 12345, 0.25, 0.5)
_BAD = Finding("sm_80", "product tokens 5", 7, 0.1, float("inf"), "wrong numbers")


def test_the_report_has_a_row_for_each_case_and_names_faults():
    lines = write_section([_GOOD, _BAD], 3).splitlines()
    assert lines[0] == f"## jax {jax.__version__}"
    assert "2 of 3 kernels executed, 1 faulty." in lines
    assert "- sm_80 product tokens 5: wrong numbers" in lines
    assert lines[-1] == "| product tokens 5 | **fault** |  | 12,345 · 0.2 · 0.50 |  |"


def test_early_reads_are_marked_and_explained():
    text = write_section([dataclasses.replace(_GOOD, early=True)], 1)
    assert "12,345 · 0.2 · 0.50 † |" in text and "1 kernels use what `tcgen05.ld` loads" in text
    assert "†" not in write_section([_GOOD], 1)


def test_a_version_replaces_its_own_section_and_keeps_the_others():
    first, second, third = "## jax 0.10.2\n\nold\n", "## jax 0.12.0\n\nnew\n", "## jax 0.9.1\n\na\n"
    report = merge(merge(merge("", second), first), third)
    assert report.index("0.9.1") < report.index("0.10.2") < report.index("0.12.0")
    again = merge(report, "## jax 0.10.2\n\nfresh\n")
    assert "fresh" in again and "old" not in again and "new" in again
    assert again.count("# The kernels, executed without a GPU") == 1


def test_a_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "findings"
    assert read_findings(None) == read_findings(path) == {}
    path.write_text(json.dumps(vars(_GOOD)) + "\n")
    assert read_findings(path) == {("sm_90a", "product tokens 5"): _GOOD}


def test_no_two_cases_have_one_name():
    names = [f"{case.arch} {name(case)}" for case in (*list_all(), *list_last_blocks())]
    assert len(names) == len(set(names))


def test_the_bound_of_a_product_holds_float32_and_not_much_more():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((5, 300)), rng.standard_normal((7, 300))
    bound = Bounded.multiply(x.astype(np.float32), w.astype(np.float32), 303, "")
    found = x.astype(np.float32) @ w.astype(np.float32).T
    assert bound.measure(found) < 1
    assert bound.measure(found * (1 + 2.0**-10)) > 1
    assert bound.round_to("bfloat16").measure(found * (1 + 2.0**-10)) < 1
    assert bound.measure(np.where(np.arange(7) == 3, np.nan, found)) == np.inf


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_bound_of_a_gate_holds_the_same_formula_in_float32(dtype):
    g, u = np.random.default_rng(1).standard_normal((2, 1000)).astype(np.float32) * 4
    exact = [Bounded(v.astype(np.float64), np.zeros(1000)) for v in (g, u)]
    found = (g / (1 + np.exp(-g)) * u).astype(dtype)
    bound = exact[0].gate(exact[1]).round_to(dtype)
    assert 0 < bound.measure(found) < 1
    assert bound.measure(found * dtype(1.01)) > 1


def test_pairs_are_grouped_by_hand():
    numbers, pairs = group(np.array([2, 0, 2, 3, 2]), 3, 2)
    assert numbers.tolist() == [0, 2, 2, 3][: len(numbers)]
    assert pairs[:3].tolist() == [[1, 5], [0, 2], [4, 5]]
