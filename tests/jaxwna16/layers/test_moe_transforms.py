"""`QuantMoE` under vmap, grad, scan over stacked layers, remat and eval_shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export

from jaxwna16 import BackendError, QuantMoE
from tests.jaxwna16.layers.expert_layers import (
    E,
    Experts,
    H,
    add_slowly,
    assert_loop,
    list_floats,
    make_experts,
    make_input,
)

PICK = {"scoring": "sigmoid", "groups": 3, "top_groups": 2, "scaling_factor": 2.5}


def list_calls(experts: Experts) -> list:
    """Functions of (x, logits), of both layers."""
    layer, linen = experts.make_nnx(), experts.make_linen()
    variables = {"params": experts.tree}
    return [lambda x, g: layer(x, g), lambda x, g: linen.apply(variables, x, g)]


def stack_states(layers: list[Experts]):
    """The graph of one NNX layer, and the states of all of them, stacked."""
    graph, _ = nnx.split(layers[0].make_nnx())
    states = [nnx.state(one.make_nnx()) for one in layers]
    return graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def step(x: jax.Array, layer) -> jax.Array:
    """x + y, with the first features of x for logits."""
    return x + layer(x, x[..., :4])


def run_in_turn(layers: list[Experts], x: jax.Array) -> jax.Array:
    for one in layers:
        x = step(x, one.make_nnx())
    return x


def run_both_ways(run, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """run(x), and the gradient of half the sum of its squares."""

    @jax.jit
    def both(x):
        y, pull_back = jax.vjp(run, x)
        return y, pull_back(y)[0]

    return both(x)


def assert_same_chain(found, expected) -> None:
    """Two orders of the same float32 sums, of less than 256 terms in each of eight products.

    A layer passes an error on about as large as it was, since its y is about as large as x.
    """
    for ours, theirs in zip(found, expected, strict=True):
        bound = 8 * 256 * 2.0**-24 * np.abs(np.asarray(theirs)).max()
        assert np.all(np.abs(np.asarray(ours - theirs)) <= bound)


def test_vmap_over_rows():
    experts = make_experts(4, bias=True)
    x, logits = make_input(3, 2, H), make_input(3, 2, 4, seed=4)
    by_nnx, by_linen = list_calls(experts)
    assert_loop(jax.jit(jax.vmap(by_nnx))(x, logits), experts, x, logits)
    mixed = jax.jit(jax.vmap(by_linen, in_axes=(1, None), out_axes=1))(x, logits[:, 0])
    assert_loop(mixed, experts, x, jnp.repeat(logits[:, :1], 2, axis=1))


def test_vmap_of_the_kernels():
    experts = make_experts(4, backend="triton", scale_dtype=jnp.bfloat16)
    x, logits = make_input(2, 1, H, dtype=jnp.bfloat16), make_input(2, 1, 4, seed=4)
    call, _ = list_calls(experts)
    assert_loop(jax.jit(jax.vmap(call))(x, logits), experts, x, logits)


def test_vmap_over_stacked_layers():
    layers = [make_experts(4, seed=seed) for seed in (0, 1)]
    graph, states = stack_states(layers)
    x, logits = make_input(3, H), make_input(3, 4, seed=4)
    run = lambda state: nnx.merge(graph, state)(x, logits)  # noqa: E731
    for one, y in zip(layers, jax.jit(jax.vmap(run))(states), strict=True):
        assert_loop(y, one, x, logits)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("nnx", {"bias": True}),
        ("linen under remat", {"activation": "gelu", **PICK}),
        (
            "nnx",
            {"activation": "swigluoai", "interleaved": True, "weigh": "input", "bias": True},
        ),
    ],
)
def test_gradients_are_the_slopes_of_the_loop(options, kind):
    """Along random directions v of x and of the logits: central differences of the loop in float64.

    Those err by d^2 times a third derivative and 2^-52 / d, together below 1e-8 of the loss. The
    layer's are float32 sums over at most 192 features in two products: 256 u of the terms they are
    made of, whose absolute values add up to less than 16 times what is left of them.
    """
    experts = make_experts(**options)
    x, logits, probe = make_input(3, H), make_input(3, E, seed=4), make_input(3, H, seed=5)
    wide = np.asarray(x, np.float64), np.asarray(logits, np.float64)
    step = 1e-5

    def loss_slowly(rows, row_logits):
        return (add_slowly(experts, rows, row_logits)[0] * np.asarray(probe)).sum()

    by_nnx, by_linen = list_calls(experts)
    run = by_nnx if kind == "nnx" else jax.checkpoint(by_linen)
    loss = lambda x, g: (run(x, g) * probe).sum()  # noqa: E731
    slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, logits)
    for place, slope in enumerate(slopes):
        for seed in range(3):
            v = np.asarray(make_input(*slope.shape, seed=10 + seed), np.float64)
            ends = []
            for sign in (1, -1):
                moved = list(wide)
                moved[place] = wide[place] + sign * step * v
                ends.append(loss_slowly(*moved))
            expected = (ends[0] - ends[1]) / (2 * step)
            terms = np.abs(np.asarray(slope) * v).sum()
            assert terms > 1
            found = (np.asarray(slope, np.float64) * v).sum()
            assert abs(found - expected) <= 16 * 256 * 2.0**-24 * terms


@pytest.fixture(scope="module")
def chain():
    """Two layers, x, and what both in turn make of x, with the gradient of that."""
    layers, x = [make_experts(4, bias=True, seed=seed) for seed in (0, 1)], make_input(3, H)
    return layers, x, run_both_ways(lambda x: run_in_turn(layers, x), x)


def test_stacked_nnx_layers_scan_under_remat(chain):
    layers, x, expected = chain
    graph, states = stack_states(layers)
    scan = nnx.scan(nnx.remat(step), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    found = run_both_ways(lambda x: scan(x, nnx.merge(graph, states, copy=True)), x)
    assert_same_chain(found, expected)
    turned = jax.tree.map(lambda leaf: leaf[::-1], states)
    other = jax.jit(lambda x: scan(x, nnx.merge(graph, turned, copy=True)))(x)
    assert np.abs(np.asarray(other - found[0])).max() > 0.1


class Block(nn.Module):
    """One layer of a Linen stack."""

    experts: Experts

    @nn.compact
    def __call__(self, x, _):
        return step(x, self.experts.make_linen().copy(name="experts")), None


def test_stacked_linen_layers_scan_under_remat(chain):
    layers, x, expected = chain
    params = {"experts": jax.tree.map(lambda *a: jnp.stack(a), *(one.tree for one in layers))}
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": False}}
    stack = nn.scan(nn.remat(Block), length=2, **axes)(layers[0])
    found = run_both_ways(lambda x: stack.apply({"params": params}, x, None)[0], x)
    assert_same_chain(found, expected)


def test_second_derivatives_through_a_scan_under_remat_are_those_of_the_floats():
    """A Hessian-vector product with both of two experts chosen, which leaves a smooth mixture.

    Each of two layers has two products in a row, which are passed four times (forward, backward,
    and their tangents), with sums of less than 256 terms: 16 * 256 u of the largest entry.
    """
    layers = [make_experts(2, seed=seed) for seed in (0, 1)]
    floats = [
        [list_floats(*part).astype(np.float32) for part in zip(one.stacks, one.specs, strict=True)]
        for one in layers
    ]
    graph, states = stack_states(layers)

    @jax.checkpoint
    def step(x, state):
        return jnp.tanh(nnx.merge(graph, state)(x, x[:, :2])), None

    def mix(x):
        for w13, w2 in floats:
            gate, up = jnp.split(jnp.einsum("th,enh->ten", x, w13), 2, axis=-1)
            y = jnp.einsum("tei,ehi->teh", jax.nn.silu(gate) * up, w2)
            x = jnp.tanh(jnp.einsum("te,teh->th", jax.nn.softmax(x[:, :2]), y))
        return x

    def multiply(f, x, v):
        slope = jax.grad(lambda x: (f(x) ** 2).sum())
        return jax.jit(jax.grad(lambda x: jnp.vdot(slope(x), v)))(x)

    x, v = make_input(2, H) / 4, make_input(2, H, seed=5)
    expected = multiply(mix, x, v)
    found = multiply(lambda x: jax.lax.scan(step, x, states)[0], x, v)
    bound = 16 * 256 * 2.0**-24 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


def test_a_symbolic_number_of_tokens_is_refused():
    experts = make_experts(2)
    call, _ = list_calls(experts)
    [t] = export.symbolic_shape("t")
    rows = (jax.ShapeDtypeStruct((t, size), jnp.float32) for size in (H, 2))
    with pytest.raises(BackendError, match=r"x \[t, 64\]: export the function once for each"):
        export.export(jax.jit(call))(*rows)


def test_abstract_layers_have_abstract_results():
    experts = make_experts(4, bias=True)
    make = lambda: QuantMoE(*experts.specs, experts=4, top_k=2, use_bias=True)  # noqa: E731
    layer = nnx.eval_shape(make)
    x = jax.ShapeDtypeStruct((5, 7, H), jnp.bfloat16)
    logits = jax.ShapeDtypeStruct((5, 7, 4), jnp.float32)
    found = nnx.eval_shape(lambda layer, x, logits: layer(x, logits), layer, x, logits)
    assert (found.shape, found.dtype) == ((5, 7, H), jnp.bfloat16)
    params = jax.eval_shape(
        experts.make_linen().init, jax.random.key(0), x, logits
    )  # as a model does before its checkpoint is read
    given = jax.tree.map(lambda leaf: leaf.shape, experts.tree)
    assert jax.tree.map(lambda leaf: leaf.shape, params["params"]) == given


def test_one_layer_serves_any_part_of_the_experts_under_jit():
    """Expert parallelism: the offset is a traced number, as `axis_index` gives it."""
    experts = make_experts(4)
    layers = [experts.take(0, 2), experts.take(2, 4)]
    graph, states = stack_states(layers)
    x, logits = make_input(3, H), make_input(3, 4, seed=4)

    def run(state, offset):
        return nnx.merge(graph, state)(x, logits, expert_offset=offset)

    parts = jax.jit(jax.vmap(run))(states, jnp.asarray([0, 2], jnp.int32))
    for one, part, offset in zip(layers, parts, (0, 2), strict=True):
        assert_loop(part, one, x, logits, offset=offset)
