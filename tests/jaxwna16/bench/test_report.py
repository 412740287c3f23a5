"""What people read: tables, targets, problems."""

from __future__ import annotations

from jaxwna16.bench.report import (
    list_problems,
    tabulate_rows,
    tabulate_targets,
    tabulate_tuned,
    write_markdown,
)
from jaxwna16.bench.targets import TARGETS, judge_targets
from tests.jaxwna16.bench.results import make_cases, make_report, make_row


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
    assert tabulate_tuned([nothing])[1][-1] == "none of them works"
