"""`quant_moe` and `float_moe` against float64, expert by expert."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import SpecError, float_moe, quant_moe
from pallas_kernels.format.dequantize import dequantize
from tests.grids import cover, sample
from tests.jaxprs import count_flops
from tests.pallas_kernels.experts import (
    assert_sum_of_experts,
    draw_choices,
    gamma,
    make_experts,
)
from tests.pallas_kernels.products import make_x


@functools.partial(jax.jit, static_argnames=("specs", "options"))
def _run(x, ids, weights, stacks, specs, options, offset):
    return quant_moe(x, ids, weights, *stacks, *specs, expert_offset=offset, **dict(options))


def run(x, ids, weights, experts, offset=0, **options):
    """One program for equal shapes, specs and options."""
    arguments = x, ids, weights, experts.stacks, experts.specs
    return _run(*arguments, tuple(options.items()), jnp.int32(offset))


@pytest.mark.parametrize(
    ("bits", "groups", "symmetric", "bias", "dtype"),
    cover(
        [
            ((4, 4), (32, 32), False, False),
            ((8, 8), (32, -1), False, True),
            ((4, 8), (-1, 32), True, True),
            ((8, 4), (128, 32), True, False),
        ],
        [jnp.float32, jnp.bfloat16, jnp.float16],
    ),
)
def test_the_xla_path_is_the_sum_of_the_chosen_experts(dtype, bits, groups, symmetric, bias):
    """I = 96 ends within a packed tile, so that the rows of up begin in its middle."""
    experts = make_experts(6, 128, 96, bits=bits, groups=groups, symmetric=symmetric, bias=bias)
    x, (ids, weights) = make_x((9, 128), dtype), draw_choices(9, 6, 3)
    y = run(x, ids, weights, experts, backend="xla")
    assert_sum_of_experts(y, x, ids, weights, experts)


@pytest.mark.parametrize("tokens", sample([1, 2, 64, 1000, 4096, 3], every=2))
def test_any_number_of_tokens(tokens):
    experts = make_experts(8, 64, 64)
    x, (ids, weights) = make_x((tokens, 64)), draw_choices(tokens, 8, 2)
    y = run(x, ids, weights, experts)
    assert_sum_of_experts(y, x, ids, weights, experts)


def test_no_tokens_give_no_rows():
    experts = make_experts(4)
    ids, weights = draw_choices(0, 4, 2)
    y = run(make_x((0, 64)), ids, weights, experts)
    assert y.shape == (0, 64)
    assert run(make_x((0, 64), jnp.bfloat16), ids, weights, experts, backend="triton").shape == (
        0,
        64,
    )


@pytest.mark.parametrize("top_k", sample([1, 3, 5, 2, 4, 6, 8, 7], every=3))
def test_any_number_of_experts_a_token(top_k):
    experts = make_experts(8)
    x, (ids, weights) = make_x((11, 64)), draw_choices(11, 8, top_k)
    assert_sum_of_experts(run(x, ids, weights, experts), x, ids, weights, experts)


def test_every_pattern_of_experts_without_tokens():
    experts = make_experts(8)
    x, (_, weights) = make_x((12, 64)), draw_choices(12, 8, 2)
    rng = np.random.default_rng(0)
    everything = run(x, *draw_choices(12, 8, 2), experts)
    for pattern in itertools.product((False, True), repeat=8):
        if any(pattern):
            ids = jnp.asarray(rng.choice(np.flatnonzero(pattern), (12, 2)), jnp.int32)
            y = run(x, ids, weights, experts)
            assert_sum_of_experts(y, x, ids, weights, experts)
            assert not np.array_equal(y, everything)


def test_an_expert_may_be_chosen_twice():
    experts = make_experts(4)
    x, (ids, weights) = make_x((40, 64)), draw_choices(40, 4, 4, repeated=True)
    assert any(len(set(row)) < 4 for row in np.asarray(ids).tolist())
    assert_sum_of_experts(run(x, ids, weights, experts), x, ids, weights, experts)


def test_halves_of_the_experts_add_up_and_strangers_give_nothing():
    experts = make_experts(8)
    x, (ids, weights) = make_x((20, 64)), draw_choices(20, 8, 3)
    whole = run(x, ids, weights, experts)
    parts = [run(x, ids, weights, experts.take(start, 4), offset=start) for start in (0, 4)]
    # blocks have another size: another order of float32 sums
    bound = 4 * gamma(64 + 64) * np.abs(np.asarray(whole)).max()
    assert np.all(np.abs(np.asarray(parts[0] + parts[1] - whole)) <= bound)
    assert all(np.abs(np.asarray(part)).max() > 1000 * bound for part in parts)
    assert not np.any(run(x, ids, weights, experts, offset=8))


def test_leading_dimensions_are_kept_and_shared_is_added_before_the_rounding():
    experts = make_experts(4)
    x, (ids, weights) = make_x((6, 64), jnp.bfloat16), draw_choices(6, 4, 2)
    flat = run(x, ids, weights, experts)
    shaped = (x.reshape(2, 3, 64), ids.reshape(2, 3, 2), weights.reshape(2, 3, 2))
    np.testing.assert_array_equal(run(*shaped, experts), flat.reshape(2, 3, 64))
    exact = run(x.astype(jnp.float32), ids, weights, experts)
    shared = jnp.asarray(-np.asarray(exact) * (1 + 2.0**-6))
    y = jax.jit(lambda s: quant_moe(x, ids, weights, *experts.arguments, shared=s))(shared)
    rounded_twice = flat.astype(jnp.float32) + shared
    assert np.abs(np.asarray(y, np.float32) - (exact + shared)).max() < (
        np.abs(np.asarray(rounded_twice - (exact + shared))).max()
    )


def test_interleaved_rows_of_gate_and_up_mean_the_same():
    experts = make_experts(4, 64, 64)
    x, (ids, weights) = make_x((5, 64)), draw_choices(5, 4, 2)
    spec = experts.specs[0]
    order = np.stack([np.arange(64), 64 + np.arange(64)], 1).reshape(-1)

    def reorder(leaf):
        leaf = np.asarray(leaf)
        if leaf.ndim == 3:
            return leaf[:, :, order]
        rows = leaf.transpose(0, 1, 3, 2, 4).reshape(4, 128, *leaf.shape[2:3], 32)[:, order]
        return rows.reshape(4, 2, 64, -1, 32).transpose(0, 1, 3, 2, 4)

    w13 = jax.tree.map(reorder, experts.stacks[0])
    assert w13["packed"].shape == (4, *spec.packed_shape)
    reordered = dataclasses.replace(experts, stacks=(w13, experts.stacks[1]))
    y = run(x, ids, weights, reordered, interleaved=True)
    np.testing.assert_array_equal(y, run(x, ids, weights, experts))


def test_float_experts_are_the_same_sum():
    experts = make_experts(6, 64, 96, scale_dtype=jnp.float32, bias=True)
    x, (ids, weights) = make_x((9, 64)), draw_choices(9, 6, 3)
    floats = [
        dequantize({n: a for n, a in stack.items() if n != "bias"}, spec)
        for stack, spec in zip(experts.stacks, experts.specs, strict=True)
    ]
    biases = {"b13": experts.stacks[0]["bias"], "b2": experts.stacks[1]["bias"]}
    y = jax.jit(float_moe)(x, ids, weights, *floats, **biases)
    assert_sum_of_experts(y, x, ids, weights, experts)


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_gradients_are_those_of_all_experts_computed_in_floats(backend):
    """For x, the weights of the router, scales and biases. 2^-7 of the largest: in bfloat16 each
    backend rounds the weight, h and the result once, each at most 2^-9 of its size on average."""
    dtype = jnp.float32 if backend == "xla" else jnp.bfloat16
    experts = make_experts(4, 64, 64, bias=True, scale_dtype=jnp.float32)
    x, (ids, weights) = make_x((5, 64), dtype), draw_choices(5, 4, 2)
    probe = make_x((5, 64), jnp.float32, seed=3)

    def loss(x, weights, scales, biases):
        stacks = [
            stack | {"scale": scale, "bias": bias}
            for stack, scale, bias in zip(experts.stacks, scales, biases, strict=True)
        ]
        y = quant_moe(x, ids, weights, *stacks, *experts.specs, backend=backend)
        return jnp.sum(y.astype(jnp.float32) * probe)

    def plain_loss(x, weights, scales, biases):
        total = jnp.zeros((5, 64), jnp.float32)
        for e, choice in itertools.product(range(4), range(2)):
            mask = jnp.where(ids[:, choice] == e, weights[:, choice], 0)
            w13, w2 = (
                dequantize(
                    {n: a[e] for n, a in stack.items() if n not in ("bias", "scale")}
                    | {"scale": scale[e]},
                    spec,
                )
                for stack, scale, spec in zip(experts.stacks, scales, experts.specs, strict=True)
            )
            h = x.astype(jnp.float32) @ w13.T + biases[0][e][None, :]
            gate, up = jnp.split(h, 2, axis=1)
            y = (jax.nn.silu(gate) * up) @ w2.T + biases[1][e][None, :]
            total = total + mask[:, None] * y
        return jnp.sum(total * probe)

    scales = [stack["scale"] for stack in experts.stacks]
    biases = [stack["bias"] for stack in experts.stacks]
    arguments = x, weights, scales, biases
    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arguments)
    expected = jax.jit(jax.grad(plain_loss, argnums=(0, 1, 2, 3)))(*arguments)
    tolerance = 2.0**-18 if backend == "xla" else 2.0**-6
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        ours, theirs = (np.asarray(a, np.float64) for a in (ours, theirs))
        assert np.abs(theirs).max() > 0
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def test_vmap_over_tokens_and_over_layers():
    experts = make_experts(4)
    others = make_experts(4, seed=1)
    x, (ids, weights) = make_x((3, 4, 64)), draw_choices(12, 4, 2)
    ids, weights = ids.reshape(3, 4, 2), weights.reshape(3, 4, 2)

    @jax.jit
    def one(x, ids, weights, stacks):
        return quant_moe(x, ids, weights, *stacks, *experts.specs)

    expected = [one(*rows, experts.stacks) for rows in zip(x, ids, weights, strict=True)]
    found = jax.vmap(one, in_axes=(0, 0, 0, None))(x, ids, weights, experts.stacks)
    # blocks differ with the number of tokens: two orders of one float32 sum
    tolerance = gamma(64 + 64) * 4 * np.abs(np.asarray(found)).max()
    np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=tolerance)
    layers = jax.tree.map(lambda *a: jnp.stack(a), experts.stacks, others.stacks)
    found = jax.vmap(one, in_axes=(0, 0, 0, 0))(x[:2], ids[:2], weights[:2], layers)
    expected = [expected[0], one(x[1], ids[1], weights[1], others.stacks)]
    np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=tolerance)


def test_no_more_than_one_expert_is_ever_expanded():
    """Float32 memory of one expert's gate and up, and once more for its transposition."""
    hidden, inner, tokens = 256, 512, 4
    experts, needed = make_experts(1, hidden, inner), {}
    for count in (4, 32):
        ids, weights = draw_choices(tokens, count, 2)
        stacks = jax.tree.map(
            lambda a, count=count: jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype),
            experts.stacks,
        )
        arguments = make_x((tokens, hidden)), ids, weights, stacks, experts.specs
        compiled = _run.lower(*arguments, (("backend", "xla"),), jnp.int32(0)).compile()
        needed[count] = compiled.memory_analysis().temp_size_in_bytes
    one = 4 * 2 * inner * hidden
    assert needed[32] <= 2.5 * one
    assert needed[32] <= needed[4] + one / 8


@pytest.mark.parametrize(("tokens", "count", "top_k"), [(1, 64, 2), (16, 64, 2), (256, 16, 4)])
def test_work_is_proportional_to_the_choices_and_not_to_the_experts(tokens, count, top_k):
    experts = make_experts(count, 64, 64)
    ids, weights = draw_choices(tokens, count, top_k)
    x = make_x((tokens, 64))
    flops = count_flops(lambda x: quant_moe(x, ids, weights, *experts.arguments, backend="xla"), x)
    least = 2 * tokens * top_k * (128 * 64 + 64 * 64)
    assert least <= flops <= 3 * least


def test_what_does_not_fit_together_is_said_in_one_error():
    experts = make_experts(4)
    x, (ids, weights) = make_x((3, 64)), draw_choices(3, 4, 2)
    with pytest.raises(SpecError, match=r"x must be \[\.\.\., 64\]") as error:
        quant_moe(x[:, :32], ids.astype(jnp.float32), weights[:2], *experts.arguments)
    assert "ids must be int32" in str(error.value)
    assert "weights must be float" in str(error.value)
    with pytest.raises(SpecError, match=r"N of w13 must be 64 \(no gate, K of w2 is 64\), got 128"):
        quant_moe(x, ids, weights, *experts.arguments, gated=False)
    with pytest.raises(SpecError, match="activation must be one of"):
        quant_moe(x, ids, weights, *experts.arguments, activation="tanh")
    with pytest.raises(SpecError, match="weigh must be one of"):
        quant_moe(x, ids, weights, *experts.arguments, weigh="both")
    w13, w2 = experts.stacks
    with pytest.raises(SpecError, match=r"w2: weights contradict .*packed has shape \[3, "):
        quant_moe(x, ids, weights, w13, jax.tree.map(lambda a: a[:3], w2), *experts.specs)
    with pytest.raises(SpecError, match="w13: packed must be"):
        quant_moe(x, ids, weights, jax.tree.map(lambda a: a[0], w13), w2, *experts.specs)
    perm = w13 | {"perm": jnp.tile(jnp.arange(64, dtype=jnp.int32), (4, 1))}
    with pytest.raises(SpecError, match="reordered features"):
        quant_moe(x, ids, weights, perm, w2, *experts.specs)
    with pytest.raises(SpecError, match="shared must be"):
        quant_moe(x, ids, weights, *experts.arguments, shared=x[:2])
    with pytest.raises(SpecError, match="x must be an array, got NoneType"):
        quant_moe(None, ids, weights, *experts.arguments)
    found = quant_moe(x, ids.tolist(), weights.tolist(), *experts.arguments)
    np.testing.assert_array_equal(found, quant_moe(x, ids, weights, *experts.arguments))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"b13": (3, 128)}, r"b13 must be float \[4, 128\], got float32 \[3, 128\]"),
        ({"b13": (4, 1)}, r"b13 must be float \[4, 128\], got float32 \[4, 1\]"),
        ({"b2": (4, 128)}, r"b2 must be float \[4, 64\], got float32 \[4, 128\]"),
        ({"w13": (0, 128, 64)}, r"w13 must be float \[E, N, K\], got float32 \[0, 128, 64\]"),
        ({"w2": (3, 64, 64)}, "w13 and w2 must have equally many experts, got 4 and 3"),
    ],
)
def test_float_experts_and_biases_that_do_not_fit_are_named(changed, message):
    shapes = {"w13": (4, 128, 64), "w2": (4, 64, 64)} | changed
    given = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(SpecError, match=message):
        float_moe(make_x((3, 64)), *draw_choices(3, 4, 2), **given)
