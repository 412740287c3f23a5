"""The tuner chooses by time among what is right, within its time, and keeps what the table has."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxwna16.bench import tune
from jaxwna16.bench.run import Deadline
from jaxwna16.bench.tune import (
    AGREEMENT,
    Trial,
    Tuned,
    Workbench,
    find_disagreement,
    pick_best,
    plan_tuning,
    tune_cases,
    write_winners,
)
from pallas_kernels.errors import TableError
from pallas_kernels.tiles.dense_rules import list_candidates
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.entries import TileTable
from pallas_kernels.tiles.expert_rules import list_moe_candidates
from pallas_kernels.tiles.expert_tiles import MoeTiles
from pallas_kernels.tiles.tables import read_table, write_table
from pallas_kernels.tiles.tiles import PREFILL, Tiles
from tests.jaxwna16.bench.results import make_cases, make_moe_cases

DEVICE = Device("an invented GPU", 132)
A = Tiles(block_m=8, block_n=128, block_k=128)
B = Tiles(block_m=8, block_n=64, block_k=128)
C = Tiles(block_m=8, block_n=256, block_k=128, warps=8)


def test_the_fastest_wins():
    trials = [Trial(A, 2e-5), Trial(B, 1e-5), Trial(PREFILL, 3e-5)]
    assert pick_best(trials) is trials[1]


def test_the_rules_choice_stays_where_another_is_faster_by_noise_only():
    trials = [Trial(A, 1.000e-5), Trial(B, 0.995e-5)]
    assert pick_best(trials) is trials[0]


def test_a_candidate_that_failed_cannot_win():
    trials = [Trial(A, None, "spills"), Trial(B, 9e-5), Trial(C, None, "wrong")]
    assert pick_best(trials) is trials[1]
    assert pick_best([Trial(A, None, "spills")]) is None


def test_every_case_is_tuned_with_its_candidates():
    cases = make_cases("4096x4096", [1, 16])
    asked = []

    def time_last_fastest(case, candidates):
        asked.append((case, list(candidates)))
        return [Trial(s, 1.0 / (i + 1)) for i, s in enumerate(candidates)]

    tuned = list(tune_cases(cases, DEVICE, Deadline(100.0), time_last_fastest))
    for case, found in zip(cases, tuned, strict=True):
        expected = list_candidates(case.spec, case.tokens, "bfloat16", "bfloat16", DEVICE)
        assert (case, expected) in asked
        assert found.best is not None
        assert found.best.schedule == expected[-1]
        assert found.describe()["candidates"] == len(expected)


def test_the_tuner_stops_when_its_time_is_over():
    now = [0.0]

    def take_a_minute(case, candidates):
        now[0] += 60.0
        return [Trial(candidates[0], 1.0)]

    cases = make_cases("4096x4096", [1, 16, 64, 256])
    tuned = tune_cases(cases, DEVICE, Deadline(100.0, lambda: now[0]), take_a_minute)
    assert [found.case.tokens for found in tuned] == [1, 16]


def test_the_first_weight_is_ahead_of_the_next_and_no_weight_waits_for_all_of_it():
    cases = make_cases("64x64,64x128", [1, 2, 16, 64, 2048])
    plan = [(case.spec.out_features, case.tokens) for case in plan_tuning(cases)]
    assert plan == [
        *((64, 1), (64, 16)),
        *((64, 64), (128, 1), (64, 2), (128, 16), (64, 2048), (128, 64)),
        *((128, 2), (128, 2048)),
    ]


def test_what_is_one_entry_of_a_table_is_tuned_once():
    cases = make_cases("64x64", [100, 128, 5000], symmetric=[False, True])
    plan = plan_tuning(cases)
    assert [case.tokens for case in plan] == [128, 4096]
    assert not any(case.spec.symmetric for case in plan)


def test_winners_are_written_beside_what_the_table_has(tmp_path):
    path = tmp_path / "new" / "table.json"
    one, sixteen = make_cases("4096x4096", [1, 16])

    def tuned(case, best):
        return Tuned(case, (best,), best if best.seconds else None)

    assert write_winners([tuned(one, Trial(A, 1.0))], DEVICE, path, {"jax": "0"}) == 1
    later = [tuned(sixteen, Trial(B, 1.0)), tuned(one, Trial(C, None, "failed"))]
    assert write_winners(later, DEVICE, path, {"jax": "1"}) == 2
    table = read_table(path)
    assert table.made == {"jax": "1"}
    assert [(entry.tokens, entry.group_size, entry.schedule) for entry in table.entries] == [
        (1, 32, A),
        (16, 32, B),
    ]
    write_winners([tuned(one, Trial(B, 1.0))], DEVICE, path, {})
    assert [entry.schedule for entry in read_table(path).entries] == [B, B]


def test_experts_are_tuned_product_by_product_and_then_together():
    [case] = make_moe_cases("qwen3-30b-a3b", [64], group_size=128)
    asked = []

    def time_apart(case, candidates):
        """Products that take their own time: 256 features are best for one, 64 for the other."""
        asked.append(list(candidates))
        cost = {64: 1.0, 128: 2.0, 256: 3.0}
        return [
            Trial(s, 10 + cost[s.second.block_n] - cost[s.first.block_n] + s.first.block_m)
            for s in candidates
        ]

    [found] = tune_cases([case], DEVICE, Deadline(100.0), time_apart)
    facts = (case.specs, 128, 64, 8, "bfloat16", ("bfloat16",) * 2)
    assert asked[0] == list_moe_candidates(*facts, DEVICE)
    assert 1 <= len(asked[1]) <= 4
    assert not set(asked[0]) & set(asked[1])
    assert found.best is not None
    best = found.best.schedule
    assert isinstance(best, MoeTiles)
    assert (best.first.block_n, best.second.block_n) == (256, 64)
    assert best in asked[1]
    facts = found.describe()
    assert facts["candidates"] == len(asked[0]) + len(asked[1])
    assert facts["rule"].startswith("blocks of 8 rows; first 128 features")
    assert facts["best"].startswith("blocks of 8 rows; first 256 features")
    assert facts["shape"] == "2048x768 E128 k8"


def test_nothing_is_put_together_when_the_time_is_over():
    now, asked = [0.0], []

    def take_a_minute(case, candidates):
        asked.append(candidates)
        now[0] += 60.0
        return [Trial(s, 1.0 / (i + 1)) for i, s in enumerate(candidates)]

    cases = make_moe_cases("qwen3-30b-a3b", [64], group_size=128)
    [found] = tune_cases(cases, DEVICE, Deadline(50.0, lambda: now[0]), take_a_minute)
    assert len(asked) == 1
    assert found.best is found.trials[-1]


def test_experts_are_tuned_in_an_order_of_their_own():
    cases = make_moe_cases("64x32x8x2", [2, 16, 64, 4096])
    assert [case.tokens for case in plan_tuning(cases)] == [16, 64, 4096, 2]
    assert set(tune.MOE_TOKENS) == set(tune.TOKENS)


def test_experts_and_linear_layers_share_a_table(tmp_path):
    path = tmp_path / "table.json"
    [layer] = make_cases("4096x4096", [1])
    [experts] = make_moe_cases("64x128x8x2", [1])
    tiles = MoeTiles(first=A, second=B)
    one, other = (
        Tuned(c, (t,), t) for c, t in ((layer, Trial(A, 1.0)), (experts, Trial(tiles, 1.0)))
    )
    assert write_winners([one], DEVICE, path, {}) == 1
    assert write_winners([other], DEVICE, path, {}) == 2
    table = read_table(path)
    assert [entry.schedule for entry in table.entries] == [A]
    assert [(entry.sizes, entry.tokens) for entry in table.experts] == [((64, 128, 8, 2), 1)]
    assert table.experts[0].schedule == tiles
    better = Trial(MoeTiles(first=B, second=B), 1.0)
    write_winners([Tuned(experts, (better,), better)], DEVICE, path, {})
    assert [entry.schedule for entry in read_table(path).experts] == [better.schedule]


def test_a_table_of_another_gpu_is_left_alone(tmp_path):
    path = tmp_path / "table.json"
    write_table(path, TileTable("another GPU", (), {}))
    with pytest.raises(TableError, match="is a table for another GPU, this is an invented GPU"):
        write_winners([], DEVICE, path, {})


@pytest.mark.parametrize(
    "wrong", [float("nan"), 2 * AGREEMENT, -2 * AGREEMENT], ids=["nan", "above", "below"]
)
def test_one_wrong_number_is_found(wrong):
    expected = jnp.linspace(-1, 1, 4096, dtype=jnp.float32).reshape(8, 512)
    right = expected.astype(jnp.bfloat16)
    assert find_disagreement([right, right], expected) is None
    fault = find_disagreement([right, right.at[3, 7].add(jnp.bfloat16(wrong))], expected)
    assert fault is not None
    assert fault.startswith("wrong: product 1 differs in 1 places")


def test_failures_are_listed_with_their_reason():
    [case] = make_cases("64x64", [1])
    trials = (Trial(A, None, "RuntimeError: too much shared memory"), Trial(B, 2e-5))
    found = Tuned(case, trials, trials[1]).describe()
    assert found["rule_seconds"] is None
    assert found["best_seconds"] == 2e-5
    assert [failure["error"] for failure in found["failures"]] == [trials[0].error]


class FakeProgram:
    """A compiled program whose products are of a given quality and take a given time."""

    products = 2

    def __init__(self, y, seconds):
        self.y, self.seconds, self.efforts = y, seconds, []

    def run(self, xs, weights):
        return [self.y] * len(xs)

    def time(self, weights, effort):
        self.efforts.append(effort)
        if isinstance(self.seconds, Exception):
            raise self.seconds
        return tune.measure_fake(self.seconds)


@pytest.fixture
def workbench(monkeypatch):
    """A workbench on which programs are made from `recipes`: schedule -> (shift, seconds)."""
    import types

    from pallas_kernels.tiles import dense_rules as schedules

    recipes, made = {}, {}

    def compile_fake(engine, case, figure, effort, *, feed):
        chosen = schedules._fixed.get()
        shift, seconds = recipes[chosen]
        if isinstance(shift, Exception):
            raise shift
        weight = bench._make_weights(case)[0]
        y = engine.compute(case, case.draw_inputs(0), weight) + jnp.bfloat16(shift)
        made[chosen] = FakeProgram(y, seconds)
        return made[chosen]

    small = tune.Effort(cold_bytes=1000, batches=3)
    monkeypatch.setattr(tune, "LONG", small)
    monkeypatch.setattr(tune, "compile_program", compile_fake)
    monkeypatch.setattr(
        tune, "measure_fake", lambda s: types.SimpleNamespace(median=s), raising=False
    )
    bench = Workbench(Deadline(100.0), backend="xla")
    return bench, recipes, made


def test_each_candidate_is_traced_with_its_schedule_and_must_be_right_to_be_timed(workbench):
    bench, recipes, made = workbench
    [case] = make_cases("64x64", [1])
    recipes |= {
        A: (0.0, 3e-5),
        B: (100.0, 1e-5),
        C: (RuntimeError("spilled\nmore"), None),
        PREFILL: (0.0, MemoryError("none left")),
    }
    trials = bench(case, [A, B, C, PREFILL])
    assert trials[0] == Trial(A, 3e-5)
    assert trials[1].seconds is None
    assert str(trials[1].error).startswith("wrong: product 0 differs in 64 places")
    assert trials[2] == Trial(C, None, "RuntimeError: spilled")
    assert trials[3] == Trial(PREFILL, None, "MemoryError: none left")
    assert made[B].efforts == []


def test_only_the_fastest_and_the_rules_choice_are_timed_at_length(workbench):
    bench, recipes, made = workbench
    [case] = make_cases("64x64", [1])
    many = [Tiles(block_m=8, block_n=64, block_k=128, splits=s) for s in range(1, 9)]
    recipes |= {tiles: (0.0, 1e-5 * (9 - tiles.splits)) for tiles in many}
    bench(case, many)
    long = [tiles.splits for tiles in many if made[tiles].efforts == [tune.SHORT, tune.LONG]]
    assert long == [1, 5, 6, 7, 8]


def test_tiles_of_experts_are_held_to_the_result_in_float32(workbench):
    """What is computed here is right in the XLA path; a shift is not."""
    bench, recipes, _ = workbench
    [case] = make_moe_cases("64x64x4x2", [3])
    right, wrong = MoeTiles(first=A, second=A), MoeTiles(first=A, second=B)
    recipes |= {right: (0.0, 3e-5), wrong: (100.0, 1e-5)}
    trials = bench(case, [right, wrong])
    assert trials[0] == Trial(right, 3e-5)
    assert str(trials[1].error).startswith("wrong: product 0 differs in 192 places")
