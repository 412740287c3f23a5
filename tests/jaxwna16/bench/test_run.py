"""A whole run: every case has a row, whatever happens to the others."""

from __future__ import annotations

import pytest

from jaxwna16.bench import run as bench
from jaxwna16.bench.run import OUT_OF_TIME, Bench, Deadline, add_shares, count_failures, find_median
from jaxwna16.bench.timing import Effort
from tests.jaxwna16.bench.results import LIMITS, make_cases, make_moe_cases, make_row, make_timing

EFFORT = Effort(batch_seconds=1e-4, batches=3, layers=2, cold_bytes=20_000)


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def time_cases(cases, deadline=None):
    return run_all(Bench(cases, "xla", EFFORT, deadline or Deadline(100.0)))


def run_all(made):
    return [row for rows in made.run() for row in rows]


def test_each_case_is_timed_chained_and_single_beside_the_float_product():
    cases = make_cases("64x128", [1, 3], bits=[4, 8])
    rows = time_cases(cases)
    assert [(row["tokens"], row["bits"]) for row in rows] == [(1, 4), (3, 4), (1, 8), (3, 8)]
    for row in rows:
        assert row["schedule"] == "xla"
        assert row["engines"]["ours"]["single"]["median"] > 0
        assert row["engines"]["ours"]["layers"] == 2
        assert find_median(row, "bf16")
    # the float product does not depend on the bits: it is timed once
    assert rows[0]["engines"]["bf16"] is rows[2]["engines"]["bf16"]


def test_on_a_gpu_graphs_and_the_expanding_path_are_timed_too(monkeypatch):
    """All of it but the GPU itself: without a backend by name, a CPU runs the XLA path."""
    monkeypatch.setattr(bench, "_MANY_TOKENS", 1)  # are more than one
    tokens = [1, 2]
    rows = run_all(Bench(make_cases("64x128", tokens), None, EFFORT, Deadline(100.0)))
    assert [set(row["engines"]["ours"]) for row in rows] == [
        {"chained", "graph_free", "single", "layers"}
    ] * len(tokens)
    assert all("graph_free" in row["engines"]["bf16"] for row in rows)
    # of many numbers of tokens, the slow path is timed at some
    assert [row["tokens"] for row in rows if "xla" in row["engines"]] == [1]


def test_experts_walk_the_same_way_and_their_grouping_is_a_part():
    rows = time_cases(make_moe_cases("64x32x4x2", [1, 3]))
    add_shares(rows, LIMITS)
    assert [row["tokens"] for row in rows] == [1, 3]
    for row in rows:
        assert set(row["engines"]) == {"ours", "bf16"}
        assert row["engines"]["ours"]["single"]["median"] > 0
        [(name, grouping)] = row["parts"].items()
        assert name == "grouping"
        seconds = find_median(row, "ours")
        assert grouping["share"] == grouping["chained"]["median"] / seconds
        assert row["figures"]["gigabytes_per_second"] == row["bytes"] / seconds / 1e9
        # a part is nothing to compare with
        assert set(row["times_as_fast_as"]) == {"bf16"}


def test_of_experts_what_xla_does_in_a_loop_is_timed_at_some_tokens_and_shortly(monkeypatch):
    compiled = []

    def compile_nothing(engine, case, figure, effort):
        compiled.append((engine.name, case.tokens, figure, effort.layers, effort.batches))
        raise RuntimeError("no GPU")

    monkeypatch.setattr(bench, "compile_program", compile_nothing)
    monkeypatch.setattr(bench, "make_weights", lambda engine, *_: [engine.packed])
    tokens = [1, 2, 4, 8, 16, 32]
    effort = Effort(batches=9, layers=64)
    rows = run_all(Bench(make_moe_cases("64x32x64x2", tokens), None, effort, Deadline(100.0)))
    ours = [one for one in compiled if one[0] == "ours"]
    assert {one[1] for one in ours} == set(tokens)
    assert {one[2:] for one in ours} == {
        (figure, 64, 9) for figure in ("chained", "graph_free", "single")
    }
    loops = [one for one in compiled if one[0] in ("bf16", "xla")]
    assert {one[:2] for one in loops} == {(name, t) for name in ("bf16", "xla") for t in (1, 16)}
    assert {one[3:] for one in loops} == {(4, 3)}
    # few pairs among many experts are not grouped
    assert {one[1] for one in compiled if one[0] == "grouping"} == {16, 32}
    assert [sorted(row["parts"]) for row in rows] == [[]] * 4 + [["grouping"]] * 2


def test_the_share_of_a_part_is_of_our_own_time():
    [case] = make_moe_cases("64x32x4x2", [1])
    row = make_row(case, ours=4e-6)
    row["parts"]["grouping"] = {"chained": make_timing(1e-6)}
    failed = make_row(case)
    failed["parts"]["grouping"] = {"error": "RuntimeError: none"}
    add_shares([row, failed], LIMITS)
    assert row["parts"]["grouping"]["share"] == pytest.approx(0.25)
    assert "share" not in failed["parts"]["grouping"]


def test_a_case_that_cannot_be_compiled_is_recorded_and_the_others_go_on(monkeypatch):
    compile_program = bench.compile_program

    def fail_at_three(engine, case, figure, effort):
        if case.tokens == 3 and engine.name == "ours":
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory\nand a page of details")
        return compile_program(engine, case, figure, effort)

    monkeypatch.setattr(bench, "compile_program", fail_at_three)
    rows = time_cases(make_cases("64x128", [1, 3, 5]))
    add_shares(rows, LIMITS)
    assert [row["engines"]["ours"].get("error") for row in rows] == [
        None,
        "RuntimeError: RESOURCE_EXHAUSTED: no memory",
        None,
    ]
    assert [row["figures"] is None for row in rows] == [False, True, False]
    assert find_median(rows[1], "bf16")
    assert count_failures(rows) == 1


def test_a_case_that_fails_while_it_runs_is_recorded(monkeypatch):
    def fail(*_, **__):
        raise MemoryError("no room for 300 weights")

    monkeypatch.setattr(bench, "make_weights", fail)
    [row] = time_cases(make_cases("64x128", [1]))
    assert row["engines"]["ours"]["error"] == "MemoryError: no room for 300 weights"
    assert row["engines"]["bf16"]["error"]


def test_when_the_time_is_over_the_other_cases_are_named_and_are_no_failures():
    clock = FakeClock()
    deadline = Deadline(10.0, clock)
    cases = make_cases("64x128,64x192", [1])

    def watch(text: str) -> None:
        clock.now += 4.0  # is told of one compilation and two engines: 12 s for the first weight

    rows = run_all(Bench(cases, "xla", EFFORT, deadline, watch))
    assert find_median(rows[0], "ours")
    assert rows[1]["engines"] == {"ours": {"error": OUT_OF_TIME}}
    add_shares(rows, LIMITS)
    assert count_failures(rows) == 0


def test_shares_are_of_the_limits_of_the_same_run():
    [case] = make_cases("1024x1024", [16])
    row = make_row(case, ours=2e-6, bf16=4e-6, peers={"gemlite": 3e-6})
    add_shares([row], LIMITS)
    packed = 1024 * 1024 // 2 + 32 * 1024 * 3
    assert row["bytes"] == packed + 2 * 16 * 2048
    memory, compute = row["bytes"] / 1e12, 2 * 16 * 1024**2 / 1e14
    assert row["figures"]["bandwidth_share"] == pytest.approx(memory / 2e-6)
    assert row["figures"]["compute_share"] == pytest.approx(compute / 2e-6)
    assert row["figures"]["gigabytes_per_second"] == pytest.approx(row["bytes"] / 2e-6 / 1e9)
    assert row["limit_seconds"] == max(memory, compute)
    assert row["times_as_fast_as"] == pytest.approx({"bf16": 2.0, "gemlite": 1.5})


def test_of_two_chains_the_faster_counts():
    [case] = make_cases("64x64", [1])
    row = make_row(case, ours=4e-6, bf16=3e-6)
    row["engines"]["ours"]["graph_free"] = {"median": 2e-6}
    row["engines"]["bf16"]["graph_free"] = {"median": 5e-6}
    add_shares([row], LIMITS)
    assert find_median(row, "ours") == 2e-6
    assert row["times_as_fast_as"] == pytest.approx({"bf16": 1.5})


def test_a_deadline_has_no_time_below_zero():
    clock = FakeClock()
    deadline = Deadline(3.0, clock)
    clock.now = 2.0
    assert deadline.left == 1.0
    clock.now = 9.0
    assert deadline.left == 0.0
