"""A peer may be absent, crash, hang or chatter: the run goes on and says so."""

from __future__ import annotations

import sys
import types

import pytest

from jaxwna16.bench import peer_worker
from jaxwna16.bench.peer_worker import BUILDERS, MARK, Source, UnservedError, serve
from jaxwna16.bench.peers import time_peers
from jaxwna16.bench.run import Deadline
from jaxwna16.bench.timing import Effort
from tests.jaxwna16.bench.results import make_cases, make_row, make_timing

EFFORT = Effort()
torch = pytest.importorskip("torch")


def run_peers(script: str, cases, seconds: float = 60.0):
    """Let Python run `script` as the worker of every peer; `say`, `name` and `order` are known."""
    head = (
        "import json, sys, time\n"
        "order = json.load(sys.stdin)\n"
        "name = order['peer']\n"
        f"def say(**message): print({MARK!r} + json.dumps(message), flush=True)\n"
    )
    rows = [make_row(case, ours=1e-5) for case in cases]
    worker = [sys.executable, "-c", head + script]
    return time_peers(cases, rows, EFFORT, Deadline(seconds), worker=worker), rows


def test_a_peer_that_is_not_installed_is_named_with_the_reason():
    said = []
    serve("humming", make_cases("64x64", [1]), EFFORT, said.append)
    assert said == [{"absent": "humming is not installed"}]


def test_without_a_gpu_pytorch_has_nothing_to_time():
    said = []
    serve("tinygemm", make_cases("64x64", [1]), EFFORT, said.append)
    assert said == [{"absent": "PyTorch sees no CUDA GPU"}]


def test_the_real_worker_answers_through_its_pipe():
    [fared] = [
        peer for peer in time_peers([], [], EFFORT, Deadline(300.0)) if peer["name"] == "humming"
    ]
    assert fared == {
        "name": "humming",
        "version": None,
        "absent": "humming is not installed",
        "error": None,
    }


def test_a_case_that_a_peer_fails_at_is_said_and_the_next_goes_on(monkeypatch):
    def build(source, dtype):
        raise UnservedError("4 bits only")

    def pretend_time(torch, case, effort, multiply, weights, source):
        return {"chained": make_timing(1e-5)}

    four, eight = make_cases("64x64", [1], bits=[4, 8])
    monkeypatch.setitem(BUILDERS, "tinygemm", ("torch", "torch", build))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(peer_worker, "_time", pretend_time)
    monkeypatch.setattr(
        peer_worker,
        "_make_copies",
        lambda torch, build, case, effort: build(None, None) if case.spec.bits == 8 else (0, 0, 0),
    )
    said = []
    serve("tinygemm", [four, eight, four], EFFORT, said.append)
    assert said[0]["version"] == torch.__version__
    assert [message.get("error") for message in said[1:]] == [
        None,
        "UnservedError: 4 bits only",
        None,
    ]


def test_times_reach_the_rows_whatever_else_is_printed():
    script = (
        "print('a library greets')\n"
        "say(version='1.2')\n"
        "say(case=1, chained={'median': 2e-5}, relative_error=0.003)\n"
        "say(case=0, error='RuntimeError: no kernel')\n"
    )
    fared, rows = run_peers(script, make_cases("64x64", [1, 16]))
    assert [peer["version"] for peer in fared] == ["1.2"] * len(BUILDERS)
    assert rows[1]["peers"]["gemlite"] == {"chained": {"median": 2e-5}, "relative_error": 0.003}
    assert rows[0]["peers"]["gemlite"] == {"error": "RuntimeError: no kernel"}


def test_a_peer_that_crashes_keeps_what_it_had_and_leaves_a_message():
    script = (
        "say(version='1.2')\n"
        "say(case=0, chained={'median': 2e-5})\n"
        "raise SystemExit('illegal memory access' if name == 'conch' else 0)\n"
    )
    fared, rows = run_peers(script, make_cases("64x64", [1]))
    errors = {peer["name"]: peer["error"] for peer in fared}
    assert errors.pop("conch") == "exit code 1: illegal memory access"
    assert set(errors.values()) == {None}
    assert rows[0]["peers"]["conch"]["chained"]["median"] == 2e-5


def test_a_peer_that_hangs_is_stopped_at_its_share_of_the_time():
    script = "say(case=0, chained={'median': 2e-5})\nif name == 'conch': time.sleep(600)\n"
    fared, rows = run_peers(script, make_cases("64x64", [1]), seconds=5.0)
    assert fared[-1]["error"].startswith("stopped after")
    assert rows[0]["peers"]["conch"]["chained"]["median"] == 2e-5


def test_of_many_cases_a_few_are_chosen():
    cases = make_cases("64x64,64x128,64x192,64x256", [1, 2, 16, 64, 128, 256, 512, 1024])
    script = "[say(case=i, chained={'median': c['tokens']}) for i, c in enumerate(order['cases'])]"
    _, rows = run_peers(script, cases)
    timed = [row for row in rows if row["peers"]]
    assert len(timed) == 18
    assert all(row["peers"]["conch"]["chained"]["median"] == row["tokens"] for row in timed)
    assert {row["out_features"] for row in timed} == {64, 128, 192}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_conch_is_given_words_that_mean_the_same_weight(monkeypatch, bits, symmetric):
    """Its kernel needs a GPU: here a stand-in reads the words as its documentation says."""

    def stand_in(x, words, scale, zero, bits, bias, group_size):
        shifts = torch.arange(0, 32, bits)
        codes = (words[:, None, :] >> shifts[None, :, None]) & ((1 << bits) - 1)
        shifted = codes.reshape(-1, words.shape[1]).float() - bias
        spread = [
            t.float().repeat_interleave(group_size, 0) for t in (scale, zero) if t is not None
        ]
        return x.float() @ ((shifted - sum(spread[1:])) * spread[0])

    module = types.ModuleType("conch.ops.quantization.gemm")
    module.mixed_precision_gemm = stand_in  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    [case] = make_cases("64x96", [1], bits=[bits], symmetric=[symmetric])
    source = draw_source(case.spec)
    multiply, weight = peer_worker.build_conch(source, torch.float32)
    x = torch.randn(3, 64)
    expected = x @ source.expand().t()
    torch.testing.assert_close(multiply(x, weight), expected, rtol=1e-4, atol=1e-3)


def test_tinygemm_says_what_it_does_not_serve():
    [case] = make_cases("64x96", [1], bits=[8])
    with pytest.raises(UnservedError, match="4 bits"):
        peer_worker.build_tinygemm(draw_source(case.spec), torch.bfloat16)


def draw_source(spec) -> Source:
    top, grouped = 1 << spec.bits, (spec.out_features, spec.groups)
    codes = torch.randint(0, top, (spec.out_features, spec.in_features), dtype=torch.uint8)
    drawn = torch.randint(0, top, grouped).float()
    zero = torch.full(grouped, float(spec.offset)) if spec.symmetric else drawn
    return Source(torch, spec, codes, torch.rand(grouped) + 0.5, zero)
