"""Cases of a decode step: both backends compute the same, bytes are counted, peers may lack."""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwna16.bench import step, step_peers
from jaxwna16.bench.engines import CHAINED
from jaxwna16.bench.run import OURS, OUT_OF_TIME, Deadline
from jaxwna16.bench.shapes import STEP_MODELS, TINY_STEP, parse_step_models
from jaxwna16.bench.step_cases import OPERATIONS, StepCase, plan_step_cases
from jaxwna16.bench.timing import ON_CPU, Timing

SMALL = dataclasses.replace(ON_CPU, batch_seconds=1e-4, batches=1, layers=2, cold_bytes=1000)
EXPERTS = dataclasses.replace(TINY_STEP, name="sparse", experts=4, top_k=2)


def make_case(operation: str, model=TINY_STEP, rows: int = 2) -> StepCase:
    return StepCase(operation, model, rows, 32, "bfloat16")


@pytest.mark.parametrize("operation", ["attention", "add_norm"])
def test_a_round_is_the_same_by_the_kernels_and_by_xla(operation):
    """Chains of two; a result is rounded to 8 bits in each, and the softmax's weights once more."""
    case = make_case(operation)
    results = []
    for backend in ("triton", "xla"):
        fixed, state, advance = case.build(2, backend)
        results.append(jax.tree.leaves(jax.jit(advance)(fixed, state)))
    for ours, theirs in zip(*results, strict=True):
        ours, theirs = (np.asarray(y, np.float32) for y in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=2**-5, atol=2**-5)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_depends_on_the_one_before(operation):
    """Otherwise XLA could take it out of the loop."""
    case = make_case(operation)
    fixed, state, advance = case.build(case.count_chain(SMALL), "xla")
    after = advance(fixed, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    before, again = jax.tree.leaves(state), jax.tree.leaves(after)
    assert [(x.shape, x.dtype) for x in before] == [(x.shape, x.dtype) for x in again]
    jaxpr = jax.make_jaxpr(advance)(fixed, state)
    carried = jaxpr.jaxpr.invars[len(jax.tree.leaves(fixed)) :]
    # what comes first of the state is the input of the next round, and must be new
    assert jaxpr.jaxpr.outvars[0] not in carried


def test_a_cache_keeps_its_size_and_gets_the_new_token():
    case = make_case("attention")
    fixed, (q, caches), advance = case.build(1, "xla")
    _, [(keys, values)] = jax.jit(advance)(fixed, (q, caches))
    for new, old in ((keys, caches[0][0]), (values, caches[0][1])):
        changed = np.flatnonzero(np.asarray(new != old).any(axis=(0, 2)))
        assert changed.tolist() == [case.seen]


def test_bytes_are_what_must_be_read_and_written():
    # 2 rows, 2 key heads of 64, 16 seen slots and the new one, keys and values of 2 bytes
    cache = 2 * 2 * 2 * 64 * 17 * 2
    attention = make_case("attention").count_bytes()
    assert attention == cache + 2 * (4 + 2 + 2 + 4) * 64 * 2
    # the product and the stream, and both again; the weight
    assert make_case("add_norm").count_bytes() == (4 * 2 + 1) * 128 * 2
    weights = 128 * 256 + 2 * 128 * 128 + 256 * 128 + 3 * 128 * 128
    # 4 bits, and of each group of 32 a scale of 2 bytes and a zero point of 1; two norms
    layer = weights // 2 + weights // 32 * 3 + 2 * 128 * 2
    assert make_case("layer").count_bytes() == layer + cache + 2 * 2 * 128 * 2
    # the head, of the embedding two rows, the last norm
    step_bytes = 2 * (layer + cache) + 64 * 128 * 2 + 2 * 128 * 2 + 128 * 2
    assert make_case("step").count_bytes() == step_bytes


def test_of_experts_those_count_that_are_touched_on_average():
    few, many = (make_case("layer", EXPERTS, rows).count_bytes() for rows in (1, 64))
    one = 3 * 128 * 128 // 2 + 3 * 128 * 128 // 32 * 3
    shared = many - few - (64 - 1) * (2 * 2 * 64 * 17 * 2 + 2 * 128 * 2)
    assert shared == pytest.approx((4 - 2) * one, rel=1e-3)


def test_floating_point_operations_are_counted():
    mix = 4 * 2 * 4 * 64 * 17
    layer = 2 * 2 * (128 * 64 * (4 + 2 + 2 + 4) + 3 * 128 * 128) + mix
    assert make_case("attention").count_flops() == mix
    assert make_case("layer").count_flops() == layer
    assert make_case("step").count_flops() == 2 * layer + 2 * 2 * 128 * 64


@pytest.mark.parametrize("model", [TINY_STEP, EXPERTS], ids=lambda model: model.name)
def test_all_operations_are_timed(model):
    cases = [make_case(operation, model) for operation in OPERATIONS]
    rows = [
        row for found in step.time_step_cases(cases, "xla", SMALL, Deadline(60)) for row in found
    ]
    assert [row["shape"] for row in rows] == [f"{each} {model.name} C=32" for each in OPERATIONS]
    for row in rows:
        assert list(row["engines"]) == [OURS]
        assert row["engines"][OURS][CHAINED]["median"] > 0, row["engines"]


def test_xlas_own_form_is_timed_beside_the_kernels_and_a_failure_is_recorded(monkeypatch):
    asked = []

    def time_case(case, backend, effort):
        asked.append(backend)
        if backend is None:
            raise ValueError("no GPU\nat all")
        return Timing(1.0, 1.0, 1.0, 1, 1)

    monkeypatch.setattr(step, "time_case", time_case)
    [[row]] = step.time_step_cases([make_case("attention")], None, SMALL, Deadline(60))
    assert asked == [None, "xla"]
    assert row["engines"][OURS] == {"error": "ValueError: no GPU"}
    assert row["engines"]["xla"][CHAINED]["median"] == 1.0
    [[row]] = step.time_step_cases([make_case("attention")], None, SMALL, Deadline(0))
    assert row["engines"][OURS] == {"error": OUT_OF_TIME}


def test_peers_time_attention_alone_and_may_be_absent_or_fail(monkeypatch):
    cases = [make_case("attention", rows=1), make_case("add_norm", rows=1)]
    rows = [{"peers": {}}, {"peers": {}}]
    installed = step_peers.importlib.util.find_spec
    hidden = ("flash_attn", "flashinfer")
    monkeypatch.setattr(
        step_peers.importlib.util, "find_spec", lambda n: None if n in hidden else installed(n)
    )
    # jax.nn itself promotes
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        outcomes = list(step.time_step_peers(cases, rows, SMALL, Deadline(60)))
    absent = {outcome["name"]: outcome["absent"] for outcome in outcomes}
    assert absent == {
        "jax.nn cudnn": None,
        "jax.nn xla": None,
        "flash_attn": "flash_attn is not installed",
        "flashinfer": "flashinfer is not installed",
    }
    assert rows[1]["peers"] == {}
    assert rows[0]["peers"]["jax.nn xla"][CHAINED]["median"] > 0
    assert "error" in rows[0]["peers"]["jax.nn cudnn"]  # on a CPU


def test_the_plan_has_every_operation_of_every_model():
    cases = plan_step_cases(STEP_MODELS.values(), (1, 16), (4096,), "float16")
    assert len(cases) == 2 * 4 * 2
    assert len({case.label for case in cases}) == len(cases)


def test_sizes_are_those_of_the_models():
    model = STEP_MODELS["llama-3.1-8b"]
    attention, step_case = (
        StepCase(each, model, 1, 4096, "bfloat16") for each in ("attention", "step")
    )
    # 8.4 MB of half a cache, and 4.5 GB of weights with the head of 1.05 GB
    assert attention.count_bytes() == pytest.approx(8.4e6, rel=0.01)
    assert step_case.count_bytes() == pytest.approx(4.9e9, rel=0.03)
    assert attention.count_chain(ON_CPU) == 12
    with pytest.raises(argparse.ArgumentTypeError, match="no model 'gpt'"):
        parse_step_models("tiny,gpt")
    assert jnp.dtype(attention.dtype).itemsize == 2
