"""A peer may be absent, crash, hang or chatter: the run goes on and says so."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import pytest

from jaxwna16.bench import dense_peers, peer_worker, peers
from jaxwna16.bench.peer_sources import Product, UnservedError, draw_source
from jaxwna16.bench.peer_worker import MARK, PEERS, Peer, check, read_case, serve
from jaxwna16.bench.peers import time_peers
from jaxwna16.bench.run import Deadline
from jaxwna16.bench.timing import Effort
from tests.jaxwna16.bench.results import make_cases, make_moe_cases, make_row, make_timing

EFFORT = Effort()
DENSE = PEERS["dense"]
torch = pytest.importorskip("torch")


def run_peers(script: str, cases, seconds: float = 60.0, absent=types.MappingProxyType({})):
    """Let Python run `script` as the worker of every peer; `say`, `name` and `order` are known.

    All are as if installed, but for the packages in `absent`, which lack a module.
    """
    head = (
        "import json, sys, time\n"
        "order = json.load(sys.stdin)\n"
        "name = order['peer']\n"
        f"def say(**message): print({MARK!r} + json.dumps(message), flush=True)\n"
    )
    rows = [make_row(case, ours=1e-5) for case in cases]
    worker = [sys.executable, "-c", head + script]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "find_missing", lambda peer: absent.get(peer.package))
        return list(time_peers(cases, rows, EFFORT, Deadline(seconds), worker=worker)), rows


def test_a_peer_that_is_not_installed_is_named_and_leaves_its_time_to_the_others():
    gone = {"gemlite": "gemlite", "humming-kernels": "humming", "conch-triton-kernels": "conch"}
    script = "time.sleep(600 if name == 'tinygemm' else 0)\n"
    fared, _ = run_peers(script, make_cases("64x64", [1]), seconds=3.0, absent=gone)
    assert [peer["absent"] for peer in fared[2:]] == [
        f"{module} is not installed" for module in gone.values()
    ]
    assert fared[0]["error"] is None
    # of five shares it had one, and what the first left
    assert fared[1]["error"].startswith("stopped after 3 s")


def test_the_real_worker_answers_through_its_pipe():
    cases = make_cases("64x64", [1])
    rows = [make_row(case) for case in cases]
    fared = {peer.pop("name"): peer for peer in time_peers(cases, rows, EFFORT, Deadline(300.0))}
    nothing = {"version": None, "error": None}
    assert fared["tinygemm"] == {"absent": "PyTorch sees no CUDA GPU", **nothing}
    assert fared["humming"] == {"absent": "humming is not installed", **nothing}


def test_a_case_that_a_peer_fails_at_is_said_and_the_next_goes_on(monkeypatch):
    def build(source, dtype):
        if source.spec.bits == 8:
            raise UnservedError("4 bits only")
        return Product(lambda x, weight: x, ())

    def draw_on_cpu(torch, case, device):
        assert device == "cuda"
        return draw_source(torch, case, "cpu")

    four, eight = make_cases("64x64", [1], bits=[4, 8])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(peer_worker, "draw_source", draw_on_cpu)
    monkeypatch.setattr(peer_worker._TorchBench, "run", lambda *_: {"chained": make_timing(1e-5)})
    said = []
    serve(Peer("torch", "torch", build), [four, eight, four], EFFORT, said.append)
    assert said[0]["version"] == torch.__version__
    assert [message.get("error") for message in said[1:]] == [
        None,
        "UnservedError: 4 bits only",
        None,
    ]


def test_a_wrong_product_is_not_timed():
    y = torch.linspace(-1, 1, 100)
    assert check(y.bfloat16(), y) < 0.01
    for wrong in (y.flip(0), y * float("nan"), torch.zeros(100)):
        with pytest.raises(UnservedError, match="wrong: the relative error is"):
            check(wrong, y)


def test_the_worker_reads_the_cases_that_it_is_sent():
    for case in (*make_cases("64x64", [3]), *make_moe_cases("64x32x8x2", [3])):
        facts = json.loads(json.dumps(dataclasses.asdict(case)))
        assert read_case(case.kind, facts) == case


def test_times_reach_the_rows_whatever_else_is_printed():
    script = (
        "print('a library greets')\n"
        "say(version='1.2')\n"
        "say(case=1, chained={'median': 2e-5}, relative_error=0.003)\n"
        "say(case=0, error='RuntimeError: no kernel')\n"
    )
    fared, rows = run_peers(script, make_cases("64x64", [1, 16]))
    assert [peer["version"] for peer in fared] == ["1.2"] * len(DENSE)
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
    source = draw_source(torch, case, "cpu")
    multiply, weight, _ = dense_peers.build_conch(source, torch.float32)
    x = torch.randn(3, 64)
    expected = source.compute(x)
    torch.testing.assert_close(multiply(x, weight), expected, rtol=1e-4, atol=1e-3)


def test_tinygemm_says_what_it_does_not_serve():
    [case] = make_cases("64x96", [1], bits=[8])
    with pytest.raises(UnservedError, match="4 bits"):
        dense_peers.build_tinygemm(draw_source(torch, case, "cpu"), torch.bfloat16)


def test_experts_have_peers_of_their_own():
    cases = make_moe_cases("64x32x8x2,64x64x8x2,64x96x8x2,64x128x8x2", [1, 2, 128, 4096])
    script = "[say(case=i, chained={'median': c['tokens']}) for i, c in enumerate(order['cases'])]"
    few = [case for case in cases if case.tokens < 128]
    fared, rows = run_peers(script, few)
    assert [peer["name"] for peer in fared] == ["torch grouped", "tokamax", "humming"]
    assert all(row["peers"]["humming"]["chained"]["median"] == row["tokens"] for row in rows)
    _, rows = run_peers(script, cases * 2)
    timed = [row for row in rows if row["peers"]]
    assert {row["tokens"] for row in timed} == {1, 4096}
    assert {row["intermediate"] for row in timed} == {32, 64, 96}
