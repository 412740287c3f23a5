"""What people read: tables, targets, problems."""

from __future__ import annotations

from jaxwna16.bench.report import (
    list_problems,
    tabulate_rows,
    tabulate_targets,
    tabulate_tuned,
    word_legend,
    write_markdown,
)
from jaxwna16.bench.targets import TARGETS, judge_targets
from tests.jaxwna16.bench.results import (
    make_cases,
    make_moe_cases,
    make_report,
    make_row,
    make_timing,
)


def find_target(rows, case):
    return next(line for line in judge_targets(rows) if line["case"] == case)


def test_a_target_is_judged_by_the_row_of_its_shape():
    [case] = make_cases("8192x8192", [1])
    seconds = make_row(case)["bytes"] / 1e12 / 0.7
    rows = make_report([make_row(case, ours=seconds, bf16=9e-5, peers={"humming": 5e-5})])["rows"]
    line = find_target(rows, "W4, M=1, 8192x8192")
    assert round(line["measured"], 6) == 0.7
    assert line["reached"] is True
    assert line["microseconds"]["humming"] == 50.0
    assert find_target(rows, "W4, M=1, 4096x4096")["measured"] is None


def test_a_missed_target_says_no():
    [case] = make_cases("8192x8192", [1024])
    rows = make_report([make_row(case, ours=2e-3, bf16=1e-3)])["rows"]
    line = find_target(rows, "W4, M=1024, 8192x8192")
    assert (line["measured"], line["reached"]) == (0.5, False)


def test_sixteen_tokens_are_compared_with_one():
    one, sixteen = make_cases("8192x8192", [1, 16])
    seconds = make_row(one)["bytes"] / 1e12
    rows = [make_row(one, ours=seconds / 0.8), make_row(sixteen, ours=seconds / 0.5)]
    line = find_target(make_report(rows)["rows"], "W4, M=16, 8192x8192")
    assert 0.28 < line["measured"] < 0.32
    assert line["reached"] is False


def test_the_worst_pair_of_asymmetric_and_symmetric_counts():
    cases = make_cases("64x64", [1, 16], symmetric=[False, True])
    times = {(False, 1): 1.0, (False, 16): 3.0, (True, 1): 1.0, (True, 16): 2.0}
    rows = [make_row(c, ours=times[c.spec.symmetric, c.tokens]) for c in cases]
    line = find_target(rows, "asymmetric / symmetric time, worst pair")
    assert (line["measured"], line["reached"]) == (1.5, False)


def test_every_target_has_a_line_and_a_dash_where_nothing_was_measured():
    header, *lines = tabulate_targets([])
    assert len(lines) == len(TARGETS)
    assert {line[header.index("measured")] for line in lines} == {"—"}
    assert {line[header.index("reached")] for line in lines} == {""}


DECODE = "MoE decode, 2048x768 E128 k8, W4, T=1..64, worst of >= 100 MB"


def make_moe_rows(tokens, shares, **facts):
    """Rows of Qwen3-30B-A3B whose time is such that they reach these shares of the copy."""
    cases = make_moe_cases("qwen3-30b-a3b", tokens, group_size=128, **facts)
    rows = [make_row(case) for case in cases]
    seconds = [row["bytes"] / 1e12 / share for row, share in zip(rows, shares, strict=True)]
    made = [make_row(case, ours=s, bf16=2 * s) for case, s in zip(cases, seconds, strict=True)]
    return make_report(made)["rows"]


def test_experts_are_judged_by_the_worst_number_of_tokens_that_moves_enough():
    rows = make_moe_rows([1, 16, 32, 64, 128], [0.1, 0.7, 0.66, 0.8, 0.2])
    assert rows[0]["bytes"] < 100e6 < rows[1]["bytes"]
    line = find_target(rows, DECODE)
    assert round(line["measured"], 6) == 0.66
    assert line["reached"] is True
    assert round(line["microseconds"]["bf16"] / line["microseconds"]["ours"], 6) == 2
    assert find_target(make_moe_rows([16], [0.64]), DECODE)["reached"] is False
    assert find_target(make_moe_rows([1], [0.9]), DECODE)["measured"] is None
    assert find_target(make_moe_rows([16], [0.9], symmetric=[True]), DECODE)["measured"] is None


def test_prefill_of_experts_is_judged_by_its_rate():
    name = "MoE prefill, 2048x768 E128 k8, W4, T=4096"
    rows = make_moe_rows([4096], [0.5])
    rate = rows[0]["flops"] / (rows[0]["bytes"] / 0.5e12) / 1e12
    line = find_target(rows, name)
    assert round(line["measured"] / rate, 6) == 1
    assert line["reached"] is (rate >= 350)
    header, *lines = tabulate_targets(rows)
    [cells] = [cells for cells in lines if cells[0] == name]
    assert cells[header.index("measured")].endswith(" TFLOP/s")


def test_grouping_is_judged_by_its_longest_time():
    rows = make_moe_rows([16, 64], [0.5, 0.5])
    rows[0]["parts"]["grouping"] = {"chained": make_timing(12e-6)}
    rows[1]["parts"]["grouping"] = {"chained": make_timing(8e-6)}
    line = find_target(rows, "MoE grouping, worst T")
    assert (round(line["measured"], 6), line["unit"], line["reached"]) == (12.0, "us", False)


def test_symmetric_experts_are_compared_with_asymmetric_ones():
    cases = make_moe_cases("64x32x8x2", [1, 16], symmetric=[False, True])
    times = {(False, 1): 1.0, (False, 16): 1.04, (True, 1): 1.0, (True, 16): 1.0}
    rows = [make_row(c, ours=times[c.symmetric, c.tokens]) for c in cases]
    line = find_target(rows, "MoE asymmetric / symmetric time, worst pair")
    assert (line["measured"], line["reached"]) == (1.04, True)


def test_a_run_is_held_to_the_targets_of_its_kind():
    [dense] = make_cases("64x64", [1])
    [experts] = make_moe_cases("64x32x8x2", [1])
    named = [{line["case"] for line in judge_targets([make_row(c)])} for c in (dense, experts)]
    assert not named[0] & named[1]
    assert all(case.startswith("MoE ") for case in named[1])
    both = {line["case"] for line in judge_targets([make_row(dense), make_row(experts)])}
    assert both == named[0] | named[1] == {target.case for target in TARGETS}


def test_experts_have_columns_of_their_own():
    cases = make_moe_cases("64x32x8x2", [1, 3], group_size=-1, bits=[4, 8])
    rows = [make_row(case, ours=1e-5) for case in cases]
    rows[0]["parts"]["grouping"] = {"chained": make_timing(2e-6)}
    rows[1]["parts"]["grouping"] = {"error": "RuntimeError: none"}
    report = make_report(rows)
    header, first, second, *_ = tabulate_rows(report["rows"])
    assert first[:3] == ["64x32 E8 k2", "1", "W4 channel asym"]
    assert header[-3:] == ["touched", "grouping us", "share"]
    assert first[-3:] == ["2", "2.00", "20%"]
    assert second[-2:] == ["—", "—"]
    assert len(header) == len(first) == len(second)
    assert "Experts: " in word_legend(rows)
    assert "Experts: " not in word_legend([make_row(case) for case in make_cases("64x64", [1])])
    assert "grouping: RuntimeError: none (1 of the cases)" in list_problems(report)
    assert "| 64x32 E8 k2 | 1 |" in write_markdown(report)


def test_a_row_without_times_has_dashes_in_every_column():
    cases = make_cases("64x64", [1, 16])
    rows = make_report([make_row(cases[0], ours=1e-5, bf16=2e-5), make_row(cases[1])])["rows"]
    header, good, bad = tabulate_rows(rows)
    assert len(header) == len(good) == len(bad)
    assert good[header.index("bf16 x")] == "2.00"
    assert set(bad[2:]) == {"—"}


def test_weights_are_named_where_they_differ():
    rows = make_report([make_row(c, ours=1e-5) for c in make_cases("64x64", [1], bits=[4, 8])])
    header, *lines = tabulate_rows(rows["rows"])
    place = header.index("weight")
    assert [line[place] for line in lines] == ["W4 g32 asym", "W8 g32 asym"]


def test_the_same_trouble_of_many_cases_is_one_line():
    rows = [make_row(case) for case in make_cases("64x64", [1, 2, 4])]
    for row in rows:
        row["engines"]["ours"] = {"error": "RuntimeError: no kernel"}
    rows[0]["peers"]["conch"] = {"error": "ValueError: 4 bits"}
    peers = [
        {"name": "gemlite", "absent": "gemlite is not installed", "error": None, "version": None},
        {"name": "conch", "absent": None, "error": "exit code 1: boom", "version": "1"},
    ]
    assert list_problems(make_report(rows, peers=peers)) == [
        "ours: RuntimeError: no kernel (3 of the cases)",
        "conch: ValueError: 4 bits (1 of the cases)",
        "peer gemlite is absent: gemlite is not installed",
        "peer conch: exit code 1: boom",
    ]


def test_markdown_holds_targets_cases_problems_and_where_they_come_from():
    rows = [make_row(case, ours=1e-5, bf16=2e-5) for case in make_cases("64x64", [1])]
    text = write_markdown(make_report(rows, problems=["a | b"]))
    assert "an invented GPU" in text
    assert "commit 0123456789" in text
    assert "torch" not in text.splitlines()[4]
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert any(line.startswith("| 64x64 | 1 |") for line in tables)
    assert "- a | b" in text
    for title in ("## Targets", "## Cases", "## Problems"):
        assert title in text


def test_tuning_shows_what_was_gained():
    [case] = make_cases("64x64", [1])
    found = case.describe() | {
        "candidates": 9,
        "failures": [{}],
        "rule_seconds": 2e-5,
        "best_seconds": 1e-5,
        "best": "decode",
    }
    header, line = tabulate_tuned([found])
    assert line[header.index("gain")] == "100%"
    nothing = found | {"rule_seconds": None, "best_seconds": None, "best": None}
    assert tabulate_tuned([nothing])[1][-1] == "none works"
