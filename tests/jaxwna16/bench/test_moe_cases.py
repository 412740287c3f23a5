"""Experts: what is counted is what the ids that are used ask for, and programs compute it."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwna16.bench.cases import count_bytes
from jaxwna16.bench.engines import (
    CHAINED,
    FLOAT,
    SINGLE,
    Engine,
    Grouping,
    compile_program,
    count_copies,
    make_weights,
)
from jaxwna16.bench.moe_cases import DRAWS, MoeCase, plan_moe_cases
from jaxwna16.bench.shapes import MOE_MODELS
from jaxwna16.bench.timing import ON_GPU, Effort
from pallas_kernels.errors import SpecError
from pallas_kernels.format.weights import check_weights
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.expert_rules import choose_moe
from tests.jaxwna16.bench.results import make_moe_cases

OURS = Engine("ours", packed=True, backend="xla")
GROUPING = Grouping("grouping", packed=True, backend="xla")
EFFORT = Effort(batch_seconds=1e-4, batches=3, layers=4, cold_bytes=20_000)
H200 = Device("NVIDIA H200", 132)


def test_a_case_is_named_by_its_experts_tokens_and_weight():
    [case] = make_moe_cases("qwen3-30b-a3b", [16], group_size=128)
    assert case.label == "2048x768 E128 k8 T=16 W4 g128 asymmetric bfloat16"
    [other] = make_moe_cases("64x32x8x2", [1], bits=[8], group_size=-1, symmetric=[True])
    assert other.label == "64x32 E8 k2 T=1 W8 channel symmetric bfloat16"


def test_every_token_chooses_different_experts_and_every_draw_others():
    [case] = make_moe_cases("64x32x8x3", [50])
    draws = [case.draw_choices(i) for i in range(DRAWS)]
    for ids, weights in draws:
        assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
        assert all(len(set(row)) == 3 for row in ids)
        assert set(ids.reshape(-1)) <= set(range(8))
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
        assert weights.min() > 0
    assert not np.array_equal(draws[0][0], draws[1][0])
    np.testing.assert_array_equal(case.draw_choices(2)[0], draws[2][0])


def test_bytes_are_those_of_the_experts_that_the_ids_touch():
    [case] = make_moe_cases("256x128x16x2", [5])
    touched = [len(np.unique(case.draw_choices(i)[0])) for i in range(DRAWS)]
    assert case.experts_touched == sum(touched) / DRAWS
    # codes at half a byte; a scale of two bytes and a zero point of one for each group of 32
    expert = 3 * 256 * 128 // 2 + 3 * (256 * 128 * 3) // 32
    activations = 5 * (256 * 2 * 2 + 2 * 8)
    assert case.describe()["bytes"] == round(case.experts_touched * expert) + activations
    assert case.describe()["float_bytes"] == (
        round(case.experts_touched * 3 * 256 * 128 * 2) + activations
    )
    assert case.flops == 2 * 5 * 2 * (256 * 256 + 128 * 256)


def test_one_token_touches_top_k_experts_and_many_touch_all():
    one, many = make_moe_cases("qwen3-30b-a3b", [1, 4096], group_size=128)
    assert (one.experts_touched, many.experts_touched) == (8.0, 128.0)
    assert 302e6 < many.packed_bytes < 320e6
    assert one.count_least_bytes(packed=True) * 16 == many.packed_bytes


@pytest.mark.parametrize("name", MOE_MODELS)
def test_copies_exceed_the_cache_and_leave_memory(name):
    [case] = make_moe_cases(name, [1], group_size=128)
    for packed in (True, False):
        copies = count_copies(case, packed, ON_GPU)
        size = count_bytes(case.describe_weight(packed))
        assert copies == 1 or copies * size <= ON_GPU.most_bytes
        # between two uses of an expert this much of others is read; the caches have 60 MB
        assert copies * case.count_least_bytes(packed) > 4 * 60e6


def test_the_facts_of_a_case_are_json():
    [case] = make_moe_cases("deepseek-v3", [3], group_size=128)
    facts = json.loads(json.dumps(case.describe()))
    assert facts["shape"] == "7168x2048 E256 k8"
    assert facts["role"] == "DeepSeek-V3 routed experts"
    sizes = [facts[name] for name in ("hidden", "intermediate", "experts", "top_k", "tokens")]
    assert sizes == [7168, 2048, 256, 8, 3]
    assert (facts["bits"], facts["group_size"], facts["symmetric"]) == (4, 128, False)


def test_cases_of_one_weight_share_it():
    cases = make_moe_cases("64x32x8x2", [1, 3], bits=[4, 8], symmetric=[False, True])
    assert len(cases) == 8
    assert len({case.weight for case in cases}) == 4
    assert len({case.float_key for case in cases}) == 2
    assert [case.weight for case in cases[:2]] == [cases[0].weight] * 2


def test_a_group_that_does_not_fit_is_refused_before_anything_runs():
    with pytest.raises(SpecError, match="100"):
        plan_moe_cases(
            [dataclasses.replace(MOE_MODELS["mixtral-8x7b"], intermediate=100)],
            [1],
            bits=[4],
            group_size=32,
            symmetric=[False],
            dtype="bfloat16",
        )


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_are_valid_stacks_with_numbers_of_their_own(symmetric):
    [case] = make_moe_cases("64x32x4x2", [1], symmetric=[symmetric])
    weights = make_weights(OURS, case, EFFORT)
    assert len(weights) == count_copies(case, True, EFFORT) >= 2
    for weight in weights:
        for leaves, spec in zip(weight, case.specs, strict=True):
            check_weights(leaves, spec, experts=4)
    packed = np.asarray(weights[0][0]["packed"])
    assert not np.array_equal(packed[0], packed[1])
    assert not np.array_equal(packed, weights[1][0]["packed"])
    assert not np.array_equal(weights[0][0]["scale"][0], weights[0][1]["scale"][0])


def compute_by_hand(case: MoeCase, inputs, weight) -> np.ndarray:
    """Float64, pair by pair."""
    x, ids, weights = (np.asarray(a, np.float64) for a in inputs)
    first, second = (np.asarray(stack, np.float64) for stack in weight)
    total = np.zeros_like(x)
    for token, pair in np.ndindex(ids.shape):
        expert = int(ids[token, pair])
        gate, up = np.split(first[expert] @ x[token], 2)
        h = gate / (1 + np.exp(-gate)) * up
        total[token] += weights[token, pair] * (second[expert] @ h)
    return total


@pytest.mark.parametrize("figure", [CHAINED, SINGLE])
def test_programs_compute_the_experts_of_each_input(figure):
    [case] = make_moe_cases("64x32x4x2", [3])
    weights = make_weights(FLOAT, case, EFFORT)
    program = compile_program(FLOAT, case, figure, EFFORT)
    xs = [case.draw_inputs(i) for i in range(program.products)]
    chosen = [weights[i % len(weights)] for i in range(program.products)]
    results = program.run(xs, chosen)
    assert len(results) == {CHAINED: 4, SINGLE: 1}[figure]
    for y, inputs, weight in zip(results, xs, chosen, strict=True):
        expected = compute_by_hand(case, inputs, weight)
        np.testing.assert_allclose(
            np.asarray(y, np.float64), expected, atol=0.02 * np.abs(expected).max()
        )


def test_the_packed_experts_give_what_their_floats_do():
    from pallas_kernels.format.dequantize import dequantize

    [case] = make_moe_cases("64x32x4x2", [3], bits=[8])
    [weight, *_] = make_weights(OURS, case, EFFORT)
    floats = tuple(
        jax.vmap(lambda leaves, spec=spec: dequantize(leaves, spec))(leaves)
        for leaves, spec in zip(weight, case.specs, strict=True)
    )
    inputs = case.draw_inputs(0)
    y = np.asarray(OURS.compute(case, inputs, weight), np.float64)
    expected = compute_by_hand(case, inputs, floats)
    assert 0.05 < np.std(expected) < 5
    np.testing.assert_allclose(y, expected, atol=0.02 * np.abs(expected).max())


def test_grouping_is_timed_alone_and_finds_every_pair():
    [case] = make_moe_cases("64x32x4x2", [3])
    weights = make_weights(GROUPING, case, EFFORT)
    program = compile_program(GROUPING, case, CHAINED, EFFORT)
    xs = [case.draw_inputs(i) for i in range(program.products)]
    for blocks, (_, ids, _) in zip(program.run(xs, weights[:1] * 4), xs, strict=True):
        found = {
            (int(pair), int(expert))
            for expert, row in zip(blocks.experts, blocks.pairs, strict=True)
            for pair in row
            if pair < 6
        }
        assert found == set(enumerate(np.asarray(ids).reshape(-1).tolist()))


def test_inputs_and_copies_take_turns_also_one_product_at_a_time():
    [case] = make_moe_cases("64x32x4x2", [3])
    weights = make_weights(OURS, case, EFFORT)
    program = compile_program(OURS, case, SINGLE, EFFORT)
    seen: list[tuple] = []

    def run(xs, chosen):
        seen.extend((np.asarray(x[1]).tobytes(), id(w)) for x, w in zip(xs, chosen, strict=True))
        return program.run(xs, chosen)

    dataclasses.replace(program, run=run).time(weights, EFFORT)
    assert len({ids for ids, _ in seen}) == DRAWS
    assert len({weight for _, weight in seen}) == len(weights)


def test_the_tuner_is_given_the_candidates_of_these_experts():
    [case] = make_moe_cases("qwen3-30b-a3b", [64], group_size=128)
    rule, *others = case.list_candidates(H200)
    facts = (case.specs, 128, 64, 8, jnp.bfloat16, (jnp.bfloat16,) * 2)
    assert rule == choose_moe(*facts, H200) == case.choose_tiles(H200)
    assert len(others) > 10
    assert case.describe_schedule(rule).startswith("blocks of 8 rows; first 128 features x 256 of")
    entry = case.make_entry(rule)
    assert (entry.sizes, entry.tokens, entry.kind) == (
        (2048, 768, 128, 8),
        64,
        (4, 128, "bfloat16"),
    )


def test_on_a_cpu_the_schedule_is_named_xla():
    [case] = make_moe_cases("64x32x4x2", [3])
    assert case.name_schedule("xla") == case.name_schedule(None) == "xla"
    assert case.is_grouped("xla")
    assert case.name_schedule("triton").startswith("blocks of 8 rows; first ")
