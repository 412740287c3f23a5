"""What `doctor` says of the fused kernels' schedules, also of a GPU that is not there."""

from __future__ import annotations

from jaxwna16.cli.backends import list_schedules, word_schedules
from pallas_kernels.errors import TableError


def test_there_are_no_schedules_without_a_gpu(call):
    assert call("doctor", "--json").report["schedules"] == []


def test_the_three_schedules_are_named_for_each_dtype_of_the_kernel():
    schedules = list_schedules("cuda")
    names = {}
    for entry in schedules:
        names.setdefault(entry["dtype"], []).append(entry["schedule"].partition(":")[0])
    assert [entry["tokens"] for entry in schedules[:5]] == [1, 16, 64, 256, 2048]
    assert names == dict.fromkeys(("bfloat16", "float16"), ["decode"] * 3 + ["middle", "prefill"])


def test_doctor_prints_a_line_for_each_number_of_tokens(call, monkeypatch):
    schedules = list_schedules("cuda")
    monkeypatch.setattr("jaxwna16.cli.backends.list_schedules", lambda: schedules)
    outcome = call("doctor")
    lines = word_schedules(schedules)
    assert len(lines) == 5
    assert lines[0].startswith(
        "W4 g128 4096 x 4096, 1 token of bfloat16, float16: decode: 8 tokens"
    )
    printed = " ".join(outcome.out.split())
    assert all(line in printed for line in lines)
    assert call("doctor", "--json").report["schedules"] == schedules


def test_a_table_of_tiles_that_cannot_be_used_is_advice(call, monkeypatch):
    def refuse():
        raise TableError("h200.json: entry 3 is stale")

    monkeypatch.setattr("jaxwna16.cli.backends.list_schedules", refuse)
    outcome = call("doctor", "--json")
    assert outcome.code == 0
    assert outcome.report["schedules"] == []
    assert "h200.json: entry 3 is stale" in outcome.report["advice"]
