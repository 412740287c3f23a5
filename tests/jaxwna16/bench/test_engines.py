"""The programs that are timed compute what they should, on weights that do not fit a cache."""

from __future__ import annotations

import dataclasses
import functools

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
    compile_program,
    count_layers,
    make_weights,
)
from jaxwna16.bench.timing import Effort
from pallas_kernels.format.weights import check_weights
from tests.jaxwna16.bench.results import make_cases

OURS = Engine("ours", packed=True, backend="xla")
EFFORT = Effort(batch_seconds=1e-4, batches=3, layers=4, cold_bytes=50_000)


def run_by_hand(engine: Engine, case, xs, weights) -> list[jax.Array]:
    compute = jax.jit(functools.partial(engine.compute, case))
    return [compute(x, w) for x, w in zip(xs, weights, strict=True)]


def draw_inputs(case, count: int) -> list:
    return [case.draw_inputs(i) for i in range(count)]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_copies_of_a_weight_are_valid_different_and_larger_than_the_cache(bits, symmetric):
    [case] = make_cases("96x80", [1], bits=[bits], symmetric=[symmetric])
    weights = make_weights(OURS, case, EFFORT)
    for weight in weights:
        check_weights(weight, case.spec)
    assert count_bytes(weights) >= EFFORT.cold_bytes
    assert not np.array_equal(weights[0]["packed"], weights[1]["packed"])
    assert count_bytes(weights[0]) == case.packed_bytes


def test_large_weights_still_take_turns():
    [case] = make_cases("512x512", [1])
    assert len(make_weights(FLOAT, case, EFFORT)) == 2


@pytest.mark.parametrize("engine", [OURS, FLOAT], ids=lambda engine: engine.name)
def test_a_chain_multiplies_each_input_with_its_weight(engine):
    [case] = make_cases("64x128", [3])
    weights, xs = make_weights(engine, case, EFFORT)[:4], draw_inputs(case, 4)
    results = compile_program(engine, case, CHAINED, EFFORT).run(xs, weights)
    for y, expected in zip(results, run_by_hand(engine, case, xs, weights), strict=True):
        np.testing.assert_array_equal(y, expected)


def test_a_product_of_a_square_weight_is_the_input_of_the_next():
    [case] = make_cases("64x64", [3])
    weights, xs = make_weights(OURS, case, EFFORT)[:4], draw_inputs(case, 4)
    [y] = compile_program(OURS, case, CHAINED, EFFORT).run(xs, weights)
    compute, expected = jax.jit(functools.partial(OURS.compute, case)), xs[0]
    for weight in weights:
        expected = compute(expected, weight)
    np.testing.assert_array_equal(y, expected)
    # results keep the size of x, whatever the length of the chain
    assert 0.2 < float(jnp.std(y.astype(jnp.float32))) < 5


def test_the_tuner_can_have_each_product_of_a_square_weight():
    [case] = make_cases("64x64", [3])
    weights, xs = make_weights(OURS, case, EFFORT)[:4], draw_inputs(case, 4)
    results = compile_program(OURS, case, CHAINED, EFFORT, feed=False).run(xs, weights)
    assert len(results) == 4
    for y, expected in zip(results, run_by_hand(OURS, case, xs, weights), strict=True):
        np.testing.assert_array_equal(y, expected)


def test_a_chain_of_one_buffer_still_computes_every_product():
    """Arguments that are the same buffer are different weights to XLA: nothing is shared."""
    [case] = make_cases("64x128", [1])
    program = compile_program(OURS, case, CHAINED, EFFORT)
    text = program.run.as_text()  # pyright: ignore[reportFunctionMemberAccess]
    entry = text[text.index("ENTRY") :]
    assert entry.count("u16[2,1,64,32]{3,2,1,0} parameter(") == 4


def test_all_copies_take_turns():
    [case] = make_cases("64x128", [1])
    seen: set[int] = set()
    program = compile_program(OURS, case, CHAINED, EFFORT)
    weights = make_weights(OURS, case, EFFORT)

    def run(xs, chosen):
        seen.update(id(weight) for weight in chosen)
        return program.run(xs, chosen)

    dataclasses.replace(program, run=run).time(weights, EFFORT)
    assert len(weights) > program.products
    assert len(seen) == len(weights)


def test_the_single_program_is_one_product():
    [case] = make_cases("64x128", [1])
    program = compile_program(OURS, case, SINGLE, EFFORT)
    assert program.products == 1
    assert program.time(make_weights(OURS, case, EFFORT), EFFORT).median > 0


def test_a_chain_is_shorter_where_products_are_large():
    [small] = make_cases("4096x4096", [1])
    [large] = make_cases("16384x16384", [4096])
    assert count_layers(small, Effort()) == 64
    layers = count_layers(large, Effort())
    assert 4 <= layers < 64
    assert layers * large.flops <= Effort().chain_flops
