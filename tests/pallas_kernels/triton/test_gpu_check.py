"""The kernels' machine code for absent GPUs is as lean as `tests.gpu_check` wants it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import gpu_aot
from tests.gpu_attention import Decode
from tests.gpu_cases import Between, Case, Grouping, list_core
from tests.gpu_check import Finding, write_report

_ROOT = Path(__file__).parents[3]
# in a folder of its own: beside jax it would complain about the missing GPU at every start
_PLUGIN = Path(sys.prefix) / "gpu-check"

_GOOD = Finding(
    case=Case("sm_90a", 15, 4, "bfloat16", 128),
    schedule="decode",
    block_m=16,
    registers=128,
    spill_bytes=0,
    shared_bytes=90_000,
    shared_limit=232_448,
    estimated_bytes=91_000,
    tensor_columns=0,
    programs=2,
    per_weight=2.9,
    opcodes={"HGMMA.64x16x16.F32.BF16": 32, "LDGSTS.E.BYPASS.128": 16},
)


def check(*options: str) -> list[dict]:
    """The findings of `tests.gpu_check`, from a process of its own: it loads the CUDA plugin."""
    if not _PLUGIN.is_dir() and importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the CUDA plugin is not installed: `make test` does it")
    command = [sys.executable, "-m", "tests.gpu_check", *options, "--json"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_PLUGIN)}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is not compiled leaves no code
    environment.pop("XLA_FLAGS", None)  # how well the tests' own programs are optimized
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def findings() -> dict[str, dict]:
    """The finding of each core case."""
    kinds = {kind.__match_args__: kind for kind in (Case, Grouping, Between, Decode)}
    return {str(kinds[tuple(f["case"])](**f["case"])): f for f in check("--core")}


@pytest.mark.parametrize("case", list_core(), ids=str)
def test_core_cases_have_no_spills_and_stay_within_budget(findings, case):
    assert findings[str(case)]["faults"] == []


@pytest.mark.parametrize(
    "case", [Case("sm_90a", 8, 4, "bfloat16", 128), Case("sm_90a", 8, 4, "float16", 64)], ids=str
)
def test_eight_tokens_exactly_spill_nothing(findings, case):
    assert findings[str(case)]["spill_bytes"] == 0


def test_attention_of_a_piece_uses_what_hopper_has_and_spills_nothing(findings):
    """Tensor cores that read keys in shared memory, where copies of 16 bytes put them."""
    long = [f for f in findings.values() if "attention of 2048" in f["case"].get("name", "")]
    assert len(long) == 2
    for finding in long:
        assert finding["spill_bytes"] == 0
        assert any(opcode.startswith("HGMMA") for opcode in finding["opcodes"])
        assert any(o.startswith("LDGSTS") and o.endswith(".128") for o in finding["opcodes"])


def test_words_that_nobody_uses_are_read_ahead_all_the_same(findings):
    """The compiler leaves out loads whose results it knows to be unused."""
    loads = {
        name: findings[str(Between("sm_90a", f"add and norm, {name}"))]["opcodes"]["LDG.E.128"]
        for name in ("Llama-3.1-8B, batch 1", "8 MiB ahead, Llama-3.1-8B, batch 1")
    }
    plain, ahead = loads.values()
    # 32 KiB by 512 threads, 16 bytes at a time
    assert ahead == plain + 4


@pytest.mark.parametrize("number", [2, pytest.param(60, marks=pytest.mark.thorough)])
def test_tiles_never_take_more_shared_memory_than_estimated(number):
    """XLA says what it needs; where that is more than there is, it compiles nothing."""
    found = check("--drawn", str(number))
    assert len(found) == number
    assert [f for f in found if f["shared_bytes"] > f["estimated_bytes"]] == []


def test_good_machine_code_has_no_faults():
    assert _GOOD.find_faults() == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"spill_bytes": 20}, "20 bytes spilled"),
        (
            {"spill_bytes": 4, "opcodes": _GOOD.opcodes | {"LDL.LU": 1, "STL": 1}},
            "4 bytes spilled",
        ),
        ({"registers": 256}, "256 registers"),
        (
            {"shared_bytes": 232_449, "estimated_bytes": 232_450},
            "232449 of 232448 bytes of shared memory",
        ),
        ({"shared_bytes": 91_001}, "91001 bytes of shared memory, not 91000"),
        (
            {"tensor_columns": 512},
            "2 programs a core with 512 of 512 columns of tensor memory each",
        ),
        ({"per_weight": 2.91}, "2.91 instructions per weight, budget 2.9"),
        ({"opcodes": {"LDGSTS.E.BYPASS.128": 1, "HMMA.16816.F32": 1}}, "no HGMMA in the loop"),
        (
            {"opcodes": {"HGMMA.64x16x16.F32.BF16": 1, "LDGSTS.E": 8}},
            "no asynchronous copy of 16 bytes in the loop",
        ),
    ],
)
def test_every_fault_is_found_and_reported(changes, fault):
    finding = dataclasses.replace(_GOOD, **changes)
    assert finding.find_faults() == [fault]
    assert fault in write_report([finding])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"spill_bytes": 4}, "4 bytes spilled"),
        ({"per_weight": 2.6}, "2.60 instructions per weight, budget 2.5"),
        ({"opcodes": {"LDGSTS.E.BYPASS.128": 1}}, "no HMMA in the loop"),
    ],
)
def test_attention_spills_nothing_and_has_budgets_of_its_own(changes, fault):
    opcodes = {"HMMA.16816.F32.BF16": 16, "LDGSTS.E.BYPASS.128": 16}
    good = dataclasses.replace(
        _GOOD,
        case=Decode("sm_90a", 128, 4, "bfloat16"),
        block_m=8,
        estimated_bytes=None,
        per_weight=2.2,
        opcodes=opcodes,
    )
    assert good.find_faults() == []
    assert dataclasses.replace(good, **changes).find_faults() == [fault]
    assert "| heads of 128 | 4 | 1 | bfloat16 | 2.20 · 128 · 88 |" in write_report([good])


def test_the_report_names_the_assembler(monkeypatch):
    monkeypatch.setattr(gpu_aot, "read_assembler_version", lambda: "13.5.37")
    assert "ptxas 13.5.37" in write_report([_GOOD])
