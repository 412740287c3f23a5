"""Mixture-of-Experts on a GPU: grouping, the grouped kernels and all that is between them.

Run with `python -m pytest -m gpu tests/gpu` on a machine with an NVIDIA GPU; skipped elsewhere.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.moe import quant_moe
from pallas_kernels.step.routing import route
from pallas_kernels.tiles.blocks import group_pairs
from pallas_kernels.tiles.dense_rules import fix_schedule
from pallas_kernels.tiles.device import find_device
from pallas_kernels.tiles.expert_rules import choose_moe, list_moe_candidates
from pallas_kernels.triton.grouping import group_few_pairs
from tests.gpu.test_products import TENSOR_CORE
from tests.pallas_kernels.experts import assert_sum_of_experts, draw_choices, make_experts
from tests.pallas_kernels.products import make_x

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"),
]


def run(x, ids, weights, experts, tiles=None, **options):
    def call(x, ids, weights, stacks):
        return quant_moe(x, ids, weights, *stacks, *experts.specs, **options)

    with fix_schedule(tiles):
        return jax.jit(call)(x, ids, weights, experts.stacks)


def assert_right(y, x, ids, weights, experts, tiles, **facts):
    """Rounded early wherever some tiles do: the bound then is a little wider than needed."""
    early = tiles.first.block_m > 8 or tiles.first.scale_on == "weight" or x.shape[0] > 256
    assert_sum_of_experts(
        y,
        x,
        ids,
        weights,
        experts,
        kernel=True,
        rounded_early=early or experts.specs[0].out_features % 128 != 0,
        sums=TENSOR_CORE,
        **facts,
    )


def choose(x, ids, experts):
    return choose_moe(
        experts.specs,
        experts.stacks[0]["packed"].shape[0],
        *ids.shape,
        x.dtype,
        tuple(stack["scale"].dtype for stack in experts.stacks),
        find_device(),
    )


@pytest.mark.parametrize(
    ("pairs", "experts", "block"),
    [(1, 1, 8), (8, 128, 8), (512, 128, 8), (300, 5, 16), (4096, 256, 16), (4000, 8, 64)],
)
def test_the_grouping_kernel_groups_as_the_fusions_do(pairs, experts, block):
    local = np.random.default_rng(pairs).integers(0, experts + 1, pairs)
    local = jnp.asarray(local, jnp.int32)
    found = jax.jit(lambda local: group_few_pairs(local, experts, block))(local)
    expected = jax.jit(lambda local: group_pairs(local, experts, block))(local)
    np.testing.assert_array_equal(found.experts, expected.experts)
    used = int(np.sum(np.asarray(expected.experts) < experts))
    np.testing.assert_array_equal(found.pairs[:used], expected.pairs[:used])


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 64, 200, 700, 1000, 4096])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_experts_are_added_for_any_number_of_tokens(tokens, bits, symmetric):
    experts = make_experts(
        16, 256, 192, bits=(bits, bits), groups=(128, 64), symmetric=symmetric, bias=True
    )
    x, (ids, weights) = make_x((tokens, 256), jnp.bfloat16), draw_choices(tokens, 16, 4)
    tiles = choose(x, ids, experts)
    assert_right(run(x, ids, weights, experts), x, ids, weights, experts, tiles)


@pytest.mark.parametrize("groups", [(32, 32), (-1, -1), (16, 48)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("inner", [64, 96, 144])
def test_group_sizes_and_sizes_that_tiles_do_not_divide(groups, dtype, inner):
    if inner % max(groups[1], 1):
        pytest.skip("groups divide K")
    experts = make_experts(8, 160, inner, groups=(groups[0], groups[1]), scale_dtype=dtype)
    x, (ids, weights) = make_x((7, 160), dtype), draw_choices(7, 8, 2)
    y = run(x, ids, weights, experts)
    # groups that 32 does not divide round the weight
    assert_sum_of_experts(
        y, x, ids, weights, experts, kernel=True, rounded_early=True, sums=TENSOR_CORE
    )


@pytest.mark.parametrize("tokens", [2, 40, 300])
def test_every_candidate_of_the_tuner_is_right(tokens):
    experts = make_experts(16, 512, 256, groups=(128, 128))
    x, (ids, weights) = make_x((tokens, 512), jnp.bfloat16), draw_choices(tokens, 16, 4)
    dtypes = tuple(stack["scale"].dtype for stack in experts.stacks)
    found = list_moe_candidates(experts.specs, 16, tokens, 4, x.dtype, dtypes, find_device())
    assert len(found) > 5
    for tiles in found[:: max(1, len(found) // 12)]:
        y = run(x, ids, weights, experts, tiles)
        assert_sum_of_experts(
            y, x, ids, weights, experts, kernel=True, rounded_early=True, sums=TENSOR_CORE
        )


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu2", "swigluoai"])
@pytest.mark.parametrize("weigh", ["input", "output"])
def test_activations_agree_with_the_xla_path(activation, weigh):
    """In float16, to 2^-8 of the largest: ten roundings of 2^-11 and what slopes make of them."""
    experts = make_experts(8, 128, 128, bias=True, scale_dtype=jnp.float16)
    x, (ids, weights) = make_x((20, 128), jnp.float16), draw_choices(20, 8, 2)
    options = {"activation": activation, "weigh": weigh}
    found = run(x, ids, weights, experts, backend="triton", **options)
    expected = run(x.astype(jnp.float32), ids, weights, experts, backend="xla", **options)
    error = np.abs(np.asarray(found, np.float32) - np.asarray(expected)).max()
    assert error <= 2.0**-8 * np.abs(np.asarray(expected)).max()


def test_experts_elsewhere_and_all_tokens_on_one():
    experts = make_experts(8, 128, 128)
    x, (ids, weights) = make_x((50, 128), jnp.bfloat16), draw_choices(50, 16, 4)
    y = run(x, ids, weights, experts, expert_offset=jnp.int32(4))
    tiles = choose(x, ids, experts)
    assert_right(y, x, ids, weights, experts, tiles, offset=4)
    one = jnp.full_like(ids, 3)
    assert_right(run(x, one, weights, experts), x, one, weights, experts, tiles)


def test_equal_inputs_give_equal_bits():
    experts = make_experts(16, 256, 128)
    x, (ids, weights) = make_x((64, 256), jnp.bfloat16), draw_choices(64, 16, 4)
    first = run(x, ids, weights, experts)
    for _ in range(3):
        np.testing.assert_array_equal(run(x, ids, weights, experts), first)


def test_routing_is_the_same_as_on_a_cpu():
    """Logits of few values, so that ties are many; NaN and infinity among them."""
    rng = np.random.default_rng(0)
    logits = rng.integers(-3, 3, (200, 64)).astype(np.float32)
    logits[3, 5], logits[4, 6], logits[5, 7] = np.nan, np.inf, -np.inf
    for options in (
        {"top_k": 8},
        {"top_k": 6, "scoring": "sigmoid", "groups": 8, "top_groups": 3, "group_score": "top2_sum"},
    ):
        found = jax.jit(functools.partial(route, **options))(logits)
        with jax.default_device(jax.devices("cpu")[0]):
            expected = jax.jit(functools.partial(route, **options))(logits)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
