"""Decode attention in interpret mode against attention in float64, see `tests...attention`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given as draw_from
from hypothesis import settings
from hypothesis import strategies as st

from pallas_kernels.errors import BackendError
from pallas_kernels.formulas.norms import Norm
from pallas_kernels.formulas.rotation import Rotation, rotate
from pallas_kernels.tiles.attention.decode_rules import Division
from pallas_kernels.triton.parts import Parts
from pallas_kernels.triton.step.decode_attention import attend_token
from tests.grids import cover, sample
from tests.pallas_kernels.attention import (
    EPS,
    Arguments,
    Step,
    add_up,
    draw,
    expect,
    name_arguments,
    poison,
)

as_written = {"xla_allow_excess_precision": False}
"""Otherwise XLA drops roundings on a CPU where it compiles operations together."""

TWO = Division(splits=2, block=16)
ONE = Division(splits=1, block=32)


@functools.partial(jax.jit, static_argnames=("step", "division"), compiler_options=as_written)
def _run(arguments, step: Step, division: Division):
    sums, biases, weights, rotation, position, active, caches = arguments
    norms = [None if w is None else Norm(w, EPS, step.norm) for w in weights]
    return attend_token(
        *map(Parts, sums, biases),
        q_norm=norms[0],
        k_norm=norms[1],
        rotation=Rotation(*rotation),
        position=position,
        active=active,
        cache_k=caches[0],
        cache_v=caches[1],
        kv_heads=step.kv_heads,
        window=step.window,
        gated=step.gated,
        paired=step.paired,
        scale=step.scale if step.whole else None,
        softcap=step.softcap,
        division=division,
        interpret=True,
    )


def run(step: Step, given: Arguments, division: Division) -> list[np.ndarray]:
    """The result and both caches. Steps that differ in positions alone are compiled once."""
    shape = dataclasses.replace(step, positions=(0,) * len(step.positions))
    return [np.asarray(out) for out in _run(name_arguments(given), shape, division)]


def assert_right(step: Step, division: Division, seed: int = 0) -> None:
    """The result within its bound; new slots as they must be, and no other slot touched."""
    given = draw(step, seed)
    result, *caches = run(step, given, division)
    right, on = expect(step, given, division), step.active > 0
    assert result.dtype == step.np_dtype
    assert np.isfinite(result.astype(np.float32)).all()
    found = result.reshape(right.result.value.shape)[on]
    assert right.result.choose(on).measure(found) <= 1
    new = []
    for cache, before in zip(caches, given.caches, strict=True):
        lines = [
            (row * step.kv_heads + head, position)
            for row, position in enumerate(step.positions)
            if position is not None
            for head in range(step.kv_heads)
        ]
        line, slot = (np.array(part, int) for part in zip(*lines, strict=True))
        new.append(cache[line, slot].reshape(on.sum(), step.kv_heads, step.head_dim))
        untouched = cache.copy()
        untouched[line, slot] = before[line, slot]
        np.testing.assert_array_equal(untouched.view(np.uint16), before.view(np.uint16))
    assert right.key.choose(on).measure(new[0]) <= 1
    np.testing.assert_array_equal(new[1], right.value[on])


def list_steps() -> list[tuple[Step, Division]]:
    """Each size of a head with six drawn combinations of everything else."""
    rng, steps = random.Random(1), []
    for head_dim, _ in itertools.product((64, 80, 96, 112, 128, 192, 256, 512), range(6)):
        step = Step(
            head_dim,
            group=rng.choice((1, 2, 4, 6, 8, 16)),
            positions=(41, None, None, 0, 12),
            slots=50,
            kv_heads=2,
            rotated=rng.choice((head_dim, head_dim // 2, head_dim // 4, 0)),
            window=rng.choice((None, 9)),
            norm=rng.choice(("", "rounded", "offset", "wide")),
            gated=rng.choice((False, True)),
            bias=rng.choice((False, True)),
            wide=rng.choice((False, False, True)),
            parts=rng.choice((1, 2, 3)),
            paired=rng.choice((False, True)),
            scales=rng.choice((False, True)),
            dtype=rng.choice(("bfloat16", "float16")),
            softcap=2.0 if head_dim in (80, 256) else None,
        )
        steps.append((step, rng.choice((TWO, ONE, Division(splits=4, block=32)))))
    return steps


@pytest.mark.parametrize(("step", "division"), sample(list_steps(), every=6))
def test_a_step_is_within_the_bound_of_attention_in_float64(step, division):
    assert_right(step, division)


def test_the_steps_that_always_run_have_every_kind():
    always = [step for step, _ in list_steps()[::6]]
    assert {step.norm for step in always} == {"", "rounded", "offset", "wide"}
    for field in ("window", "gated", "bias", "wide", "dtype", "paired", "scales", "softcap"):
        assert len({getattr(step, field) for step in always}) == 2
    assert {step.parts for step in always} == {1, 2, 3}


@draw_from(
    positions=st.lists(st.none() | st.integers(0, 69), min_size=3, max_size=3),
    window=st.sampled_from([None, 1, 17, 100]),
    division=st.sampled_from([TWO, ONE]),
)
@settings(max_examples=25, deadline=None)
def test_any_position_and_window_is_right(positions, window, division):
    """70 slots are no multiple of a block, and at position 69 the last one is written."""
    positions = tuple(positions) if any(p is not None for p in positions) else (69, 0, 33)
    assert_right(Step(16, 2, positions, 70, 1, 16, window), division)


@draw_from(
    positions=st.lists(st.none() | st.integers(0, 69), min_size=3, max_size=3),
    window=st.sampled_from([None, 17]),
    division=st.sampled_from([TWO, ONE]),
)
@settings(max_examples=25, deadline=None)
def test_slots_that_are_not_seen_never_reach_a_result(positions, window, division):
    step = Step(16, 2, tuple(positions), 70, 1, 16, window)
    given = draw(step)
    clean, *_ = run(step, poison(step, given, 0), division)
    dirty, *_ = run(step, poison(step, given, np.nan), division)
    assert np.isfinite(clean.astype(np.float32)).all()
    np.testing.assert_array_equal(clean.view(np.uint16), dirty.view(np.uint16))


@pytest.mark.parametrize(
    ("rotated", "parts", "wide", "dtype", "paired"),
    cover([64, 32], [1, 3], [False, True], ["bfloat16", "float16"], [False, True]),
)
def test_written_keys_have_the_bits_of_the_models_own_rotation(rotated, parts, wide, dtype, paired):
    """With float32 cosines one of the products may be fused with the sum: then as near as that."""
    step = Step(64, 1, (3, 7), 8, 2, rotated, parts=parts, wide=wide, dtype=dtype, paired=paired)
    given = draw(step)
    _, cache, _ = run(step, given, ONE)
    k = add_up(given.sums[1], None, step.np_dtype).reshape(2, 1, 2, 64)
    tables = [jnp.asarray(table)[:, None] for table in given.rotation[:2]]
    x = jnp.asarray(k, jnp.float32 if wide else step.np_dtype)
    turn = jax.jit(rotate, static_argnames="paired", compiler_options=as_written)
    keys = np.asarray(turn(x, *tables, paired=paired).astype(step.np_dtype))[:, 0]
    found = np.stack([cache[:2, 3], cache[2:, 7]])
    if wide:
        assert (found != keys).mean() < 1e-2
    else:
        np.testing.assert_array_equal(found, keys)


def test_results_have_the_same_bits_each_time_and_in_any_batch():
    step = Step(64, 4, (41, 5, 20), 50, 2, 64, parts=2)
    given = draw(step)
    result, *_ = run(step, given, TWO)
    again, *_ = run(step, given, TWO)
    np.testing.assert_array_equal(result, again)
    alone = Step(64, 4, (5,), 50, 2, 64, parts=2)
    rows = Arguments(
        tuple(sums[:, 1:2] for sums in given.sums),
        given.biases,
        given.weights,
        tuple(table[1:2] for table in given.rotation),
        given.position[1:2],
        given.active[1:2],
        tuple(cache[2:4] for cache in given.caches),
    )
    np.testing.assert_array_equal(run(alone, rows, TWO)[0], result[1:2])


def test_more_heads_than_a_program_has_are_shared_out():
    assert_right(Step(16, 40, (30, 3, None), 40, 2, 16, gated=True), TWO)
    assert_right(Step(16, 40, (30, 3, None), 40, 2, 16, gated=True), ONE)


def test_a_softcap_is_told_from_none():
    step = Step(64, 4, (41, 20), 50, 2, 64, softcap=3.0)
    given = draw(step)
    result, *_ = run(step, given, TWO)
    other = expect(dataclasses.replace(step, softcap=None), given, TWO).result
    assert other.measure(result.reshape(other.value.shape)) > 1


def test_whole_numbers_are_exact():
    step = Step(64, 4, (60, 20), 70, 2, 64, parts=2, whole=True)
    given = draw(step)
    result, *_ = run(step, given, TWO)
    right = expect(step, given, TWO).result
    exact = right.value.astype(np.float32).astype(step.np_dtype)
    np.testing.assert_array_equal(result.reshape(exact.shape), exact)


@pytest.mark.parametrize("norm", ["", "wide"])
def test_without_tables_heads_are_as_with_empty_ones(norm):
    step = Step(16, 2, (40, 3), 50, 2, norm=norm)
    given = draw(step)
    bare = dataclasses.replace(given, rotation=None)
    for found, right in zip(run(step, bare, TWO), run(step, given, TWO), strict=True):
        np.testing.assert_array_equal(found, right)


def test_the_rule_divides_a_cache_that_nobody_divided():
    step = Step(16, 2, (300, 90), 400, 1, 16)
    given = draw(step)
    result, *_ = run(step, given, None)  # pyright: ignore[reportArgumentType]
    right = expect(step, given, Division(64, 16)).result
    assert right.measure(result.reshape(right.value.shape)) <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": np.float32}, "bfloat16 or float16"),
        ({"kv_heads": 3}, "each key head"),
        ({"window": 0}, "window"),
        ({"kind": "narrow"}, "norms of a kind"),
        ({"kind": "centered"}, "norms of a kind"),
        ({"rotated": 32}, "rotated"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    dtype, kv_heads = change.get("dtype", jnp.bfloat16), change.get("kv_heads", 1)
    parts = Parts(jnp.zeros((1, 2, 16), dtype))
    cache = jnp.zeros((2, 8, 16), dtype)
    table = jnp.ones((2, change.get("rotated", 16) // 2), dtype)
    norm = Norm(jnp.ones(16, dtype), EPS, change.get("kind", "wide"))
    with pytest.raises(BackendError, match=message):
        attend_token(
            parts,
            parts,
            parts,
            q_norm=norm,
            k_norm=None,
            rotation=Rotation(table, table),
            position=jnp.zeros(2, jnp.int32),
            active=jnp.ones(2, jnp.int32),
            cache_k=cache,
            cache_v=cache,
            kv_heads=kv_heads,
            window=change.get("window"),
            gated=False,
            interpret=True,
        )
