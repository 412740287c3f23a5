"""The grouped kernels, interpreted: every way to divide the work gives the same sum."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BackendError, quant_moe
from pallas_kernels.tiles.dense_rules import fix_schedule
from pallas_kernels.tiles.expert_tiles import MoeTiles
from pallas_kernels.tiles.tiles import Tiles
from tests.grids import sample
from tests.jaxprs import find_kernels
from tests.pallas_kernels.experts import assert_sum_of_experts, draw_choices, make_experts
from tests.pallas_kernels.products import make_x


def make_tiles(block_m=8, splits=(1, 1), *, direct=False, block_n=64, **more) -> MoeTiles:
    """Small tiles for weights of 4 bits; one step of K is 128."""
    tiles = Tiles(block_m=block_m, block_n=block_n, block_k=128, **more)
    first, second = (dataclasses.replace(tiles, splits=count) for count in splits)
    return MoeTiles(first=first, second=second, direct=direct)


@functools.partial(jax.jit, static_argnames=("specs", "tiles", "weigh"))
def _run(x, ids, weights, stacks, specs, tiles, weigh, offset):
    with fix_schedule(tiles):
        return quant_moe(
            x,
            ids,
            weights,
            *stacks,
            *specs,
            backend="triton",
            weigh=weigh,
            expert_offset=offset,
        )


def run(x, ids, weights, experts, tiles=None, weigh="output", offset=0):
    """One program for equal shapes, specs and tiles."""
    arguments = x, ids, weights, experts.stacks, experts.specs
    return _run(*arguments, tiles, weigh, jnp.int32(offset))


@pytest.mark.parametrize(
    ("bits", "groups", "symmetric", "bias", "dtype"),
    [
        ((4, 4), (32, 32), False, True, jnp.bfloat16),
        ((4, 8), (-1, 64), True, True, jnp.float16),
        pytest.param((8, 8), (128, -1), True, False, jnp.bfloat16, marks=pytest.mark.thorough),
        pytest.param((8, 4), (64, 32), False, False, jnp.float16, marks=pytest.mark.thorough),
    ],
)
def test_the_kernels_add_the_chosen_experts(dtype, bits, groups, symmetric, bias):
    """By the rule's own tiles: gate, up and their activation are one program."""
    experts = make_experts(
        4, 128, 64, bits=bits, groups=groups, symmetric=symmetric, bias=bias, scale_dtype=dtype
    )
    x, (ids, weights) = make_x((5, 128), dtype), draw_choices(5, 4, 2)
    y = run(x, ids, weights, experts)
    assert_sum_of_experts(y, x, ids, weights, experts, kernel=True)


@pytest.mark.parametrize(
    ("name", "tokens", "tiles", "rounded_early"),
    [
        pytest.param(
            "pairs as they are", 3, make_tiles(direct=True), False, marks=pytest.mark.thorough
        ),
        ("the first split", 3, make_tiles(splits=(2, 1)), False),
        ("both split, pairs as they are", 2, make_tiles(splits=(3, 2), direct=True), False),
        pytest.param("16 rows", 30, make_tiles(16), False, marks=pytest.mark.thorough),
        ("32 rows, gate and up apart", 30, make_tiles(32), True),
        pytest.param(
            "scale on the weight",
            30,
            make_tiles(64, scale_on="weight"),
            True,
            marks=pytest.mark.thorough,
        ),
        ("128 rows, wide", 70, make_tiles(128, block_n=128, scale_on="weight"), True),
        pytest.param(
            "8 rows, more than 256 tokens",
            300,
            make_tiles(8),
            True,
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_every_division_of_the_work_gives_the_sum(name, tokens, tiles, rounded_early):
    """K = 320 has a last step that is not full; 192 features are three tiles of 64."""
    del name
    experts = make_experts(4, 320, 192, groups=(64, 64), bias=True)
    x, (ids, weights) = make_x((tokens, 320), jnp.bfloat16), draw_choices(tokens, 4, 2)
    y = run(x, ids, weights, experts, tiles)
    assert_sum_of_experts(y, x, ids, weights, experts, kernel=True, rounded_early=rounded_early)


def test_many_pairs_are_grouped_by_fusions():
    experts = make_experts(8, 64, 64)
    x, (ids, weights) = make_x((1400, 64), jnp.bfloat16), draw_choices(1400, 8, 3)
    y = run(x, ids, weights, experts, make_tiles(128, scale_on="weight"))
    assert_sum_of_experts(y, x, ids, weights, experts, kernel=True, rounded_early=True)


@pytest.mark.parametrize("direct", [False, True])
def test_every_pattern_of_experts_without_tokens(direct):
    experts = make_experts(4, 64, 64)
    x, (_, weights) = make_x((3, 64), jnp.bfloat16), draw_choices(3, 4, 2)
    rng = np.random.default_rng(0)

    def call(ids):
        return quant_moe(x, ids, weights, *experts.arguments, backend="triton")

    with fix_schedule(make_tiles(direct=direct)):
        compiled = jax.jit(call).lower(jnp.zeros((3, 2), jnp.int32)).compile()
    for pattern in itertools.product((False, True), repeat=4):
        if any(pattern):
            ids = jnp.asarray(rng.choice(np.flatnonzero(pattern), (3, 2)), jnp.int32)
            assert_sum_of_experts(compiled(ids), x, ids, weights, experts, kernel=True)


@pytest.mark.parametrize("direct", sample([False, True], every=2))
def test_experts_that_are_elsewhere_give_nothing(direct):
    experts = make_experts(4, 64, 64)
    x, (ids, weights) = make_x((6, 64), jnp.bfloat16), draw_choices(6, 8, 3)
    y = run(x, ids, weights, experts, make_tiles(direct=direct), offset=2)
    assert_sum_of_experts(y, x, ids, weights, experts, kernel=True, offset=2)
    nothing = run(x, ids, weights, experts, make_tiles(direct=direct), offset=99)
    assert not np.any(nothing)


def test_rows_of_up_that_begin_within_a_packed_tile():
    """I = 96: gate and up cannot be two columns of tiles, so the activation comes afterwards."""
    experts = make_experts(4, 64, 96)
    x, (ids, weights) = make_x((4, 64), jnp.bfloat16), draw_choices(4, 4, 2)
    y = run(x, ids, weights, experts)
    assert_sum_of_experts(y, x, ids, weights, experts, kernel=True, rounded_early=True)


def test_the_weight_may_multiply_what_goes_in():
    """Times 2 before the first product or after the last is another function for silu."""
    experts = make_experts(4, 64, 64, bias=True)
    x, (ids, _) = make_x((3, 64), jnp.bfloat16), draw_choices(3, 4, 1)
    weights = jnp.full((3, 1), 2.0)
    y = run(x, ids, weights, experts, weigh="input")
    doubled = run(x * 2, ids, weights / 2, experts)
    np.testing.assert_array_equal(y, doubled)
    assert not np.array_equal(y, run(x, ids, weights, experts))


def test_equal_inputs_give_equal_bits_and_vmap_folds_into_one_call():
    experts = make_experts(4, 64, 64)
    x, (ids, weights) = make_x((6, 64), jnp.bfloat16), draw_choices(6, 4, 2)

    def call(x, ids, weights):
        return quant_moe(x, ids, weights, *experts.arguments, backend="triton")

    with fix_schedule(make_tiles(splits=(1, 2))):
        whole = jax.jit(call)(x, ids, weights)
        halves = (a.reshape(2, 3, -1) for a in (x, ids, weights))
        mapped = jax.jit(jax.vmap(call))(*halves)
        np.testing.assert_array_equal(mapped.reshape(6, 64), whole)


def test_few_tokens_are_three_kernels_and_one_token_two():
    """Grouping, gate and up with their activation, down. A weight is read by one kernel only."""
    experts = make_experts(128, 64, 64)

    def count(tokens, inner=experts):
        x, (ids, weights) = make_x((tokens, 64), jnp.bfloat16), draw_choices(tokens, 128, 8)

        def call(x, ids, weights):
            return quant_moe(x, ids, weights, *inner.arguments, backend="triton")

        return len(find_kernels(call, x, ids, weights))

    assert count(1) == 2
    assert count(32) == 3
    assert count(600) == 2  # more pairs than the grouping kernel is for


def test_what_the_kernels_cannot_do_is_an_error():
    experts = make_experts(4, 64, 64, scale_dtype=jnp.float32)
    ids, weights = draw_choices(3, 4, 2)
    with pytest.raises(BackendError, match="multiplies bfloat16 or float16"):
        run(make_x((3, 64)), ids, weights, experts)
    x = make_x((3, 64), jnp.bfloat16)
    with pytest.raises(BackendError, match="scale_on='weight' needs scales of the dtype of x"):
        run(x, ids, weights, experts, make_tiles(scale_on="weight"))
    with pytest.raises(BackendError, match="block_n must be one of"):
        run(x, ids, weights, experts, make_tiles(block_n=48))
