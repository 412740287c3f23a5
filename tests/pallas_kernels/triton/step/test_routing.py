"""The kernel that routes: against sorting, exhaustively, and against the form of XLA.

Interpreted, its scores are those of XLA's form to the bit, but for the order of sums: of E numbers
and of top_k. So the choice is the same, and weights are at most (E + top_k + 8) u apart: each form
errs by half of that.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.errors import BackendError
from pallas_kernels.formulas.routing_options import Routing
from pallas_kernels.formulas.routing_scores import SCORINGS
from pallas_kernels.step.routing import route
from pallas_kernels.triton.step.routing import choose_experts
from pallas_kernels.xla.routing import choose_experts as choose_by_xla
from tests.jaxprs import find_kernels

U = 2.0**-24
INF, NAN = np.inf, np.nan
run = jax.jit(functools.partial(choose_experts, interpret=True), static_argnums=1)
run_by_xla = jax.jit(choose_by_xla, static_argnums=1)


def list_orders() -> np.ndarray:
    """Every order of 4 to 6 different logits, and every row of 6 that has at most 3 values.

    Those of 4 and 5 are filled up with smaller ones.
    """
    orders = [
        (*row, *[-8.0] * (6 - count))
        for count in (4, 5, 6)
        for row in itertools.permutations(range(count))
    ]
    return np.array([*orders, *itertools.product(range(3), repeat=6)], np.float32)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_every_order_of_few_logits_is_sorted(scoring):
    rows = list_orders()
    order = np.lexsort((np.broadcast_to(np.arange(6), rows.shape), -rows))
    for top_k in (1, 2, 5, 6):
        ids, weights = run(rows, Routing(top_k=top_k, scoring=scoring), None)
        np.testing.assert_array_equal(ids, order[:, :top_k])
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=0, atol=2 * top_k * U)


@pytest.mark.parametrize(
    ("groups", "top_groups", "group_score"),
    [(2, 1, "top2_sum"), (3, 1, "top2_sum"), (3, 2, "top2_sum"), (3, 2, "max"), (6, 4, "max")],
)
def test_groups_of_every_order_are_chosen_as_xla_does(groups, top_groups, group_score):
    rows = list_orders()
    routing = Routing(
        top_k=2,
        scoring="sigmoid",
        groups=groups,
        top_groups=top_groups,
        group_score=group_score,
    )
    bias = jnp.float32([0.25, 0.0, -0.5, 0.0, 0.125, 0.0])
    for given_bias in (None, bias):
        assert_same(run(rows, routing, given_bias), run_by_xla(rows, routing, given_bias), routing)


def assert_same(ours, theirs, routing: Routing, experts: int = 6) -> None:
    np.testing.assert_array_equal(ours[0], theirs[0])
    most = (experts + routing.top_k + 8) * U
    np.testing.assert_allclose(ours[1], theirs[1], rtol=most, atol=0, equal_nan=True)


_FINITE, _TOKENS, _EXPERTS = (-3.0, -1.25, 0.0, 0.5, 2.0, 18.0, 30.0), 4, 12
_BIASES = (-1.5, 0.0, -0.0, 0.25, INF, -INF, 3e38)


def draw_row(values) -> st.SearchStrategy:
    return st.lists(st.sampled_from(values), min_size=_EXPERTS, max_size=_EXPERTS)


def draw_rows() -> st.SearchStrategy:
    """Few values; some tokens have all that is no number."""
    row = draw_row(_FINITE) | draw_row((*_FINITE, -INF)) | draw_row((*_FINITE, INF, NAN, -NAN))
    return st.lists(row, min_size=_TOKENS, max_size=_TOKENS)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_whatever_the_logits_are_the_choice_is_that_of_xla(scoring):
    routings = [
        Routing(top_k=3, scoring=scoring),
        Routing(top_k=2, scoring=scoring, groups=4, top_groups=2, renormalize=False),
        Routing(
            top_k=5,
            scoring=scoring,
            groups=4,
            top_groups=3,
            group_score="top2_sum",
            scaling_factor=2.5,
        ),
    ]
    biases = st.none() | draw_row(_BIASES) | draw_row((-1.5, -2.0, -0.75))
    seen = set()

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.sampled_from(routings), draw_rows(), biases)
    def hold(routing, rows, bias):
        rows = jnp.float32(rows)
        bias = None if bias is None else jnp.float32(bias)
        found = run(rows, routing, bias)
        assert_same(found, run_by_xla(rows, routing, bias), routing, _EXPERTS)
        seen.update(np.isnan(np.asarray(found[1])).any(-1).tolist())

    hold()
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("experts", "dtype", "options"),
    [
        (128, "bfloat16", {"top_k": 8}),
        (160, "float32", {"top_k": 6, "groups": 8, "top_groups": 3, "renormalize": False}),
        (256, "float32", {"top_k": 8, "scoring": "sigmoid", "groups": 8, "top_groups": 4}),
        (384, "float32", {"top_k": 8, "scoring": "sigmoid", "scaling_factor": 2.5}),
        (256, "float16", {"top_k": 6, "scoring": "sqrt_softplus"}),
        (1024, "float32", {"top_k": 32}),
        (2, "float32", {"top_k": 1}),
        (1, "float32", {"top_k": 1}),
    ],
)
@pytest.mark.parametrize("tokens", [1, 64])
def test_published_sizes_are_routed_as_xla_does(experts, dtype, options, tokens):
    rng = np.random.default_rng(experts)
    logits = jnp.asarray(rng.normal(size=(tokens, experts)).astype(np.float32)).astype(dtype)
    score = "top2_sum" if options.get("scoring") == "sigmoid" and "groups" in options else "max"
    routing = Routing(group_score=score, **options)
    bias = None
    if options.get("scoring") == "sigmoid":
        bias = jnp.asarray(rng.normal(size=experts).astype(np.float32)) * 0.1
    assert_same(run(logits, routing, bias), run_by_xla(logits, routing, bias), routing, experts)


def test_a_broken_token_spoils_no_other():
    rows = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    routing = Routing(top_k=4, groups=3, top_groups=2)
    whole = run(rows, routing, None)
    broken = rows.copy()
    broken[2, 13], broken[4] = NAN, -INF
    ids, weights = map(np.asarray, run(broken, routing, None))
    assert ids[[2, 4]].tolist() == [[0, 1, 2, 3]] * 2
    assert np.isnan(weights[[2, 4]]).all()
    for found, other in zip((ids, weights), whole, strict=True):
        np.testing.assert_array_equal(found[[0, 1, 3]], np.asarray(other)[[0, 1, 3]])


def test_route_is_one_kernel_on_a_gpu_with_the_slopes_of_xla():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 8)).astype(np.float32))

    def weigh(logits, backend):
        return (route(logits, top_k=3, backend=backend)[1] ** 2).sum()

    slopes = [jax.jit(jax.grad(weigh), static_argnums=1)(logits, b) for b in ("triton", "xla")]
    np.testing.assert_allclose(*slopes, rtol=0, atol=64 * U)
    assert np.abs(slopes[0]).max() > 0.01
    mapped = jax.vmap(lambda rows: route(rows, top_k=3, backend="triton"))(logits)
    for ours, theirs in zip(mapped, route(logits, top_k=3), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=32 * U)
    for backend in (None, "triton"):
        [kernel] = find_kernels(lambda x, b=backend: route(x, top_k=3, backend=b), logits)
        assert kernel.params["grid_mapping"].grid == (6,)
    assert not find_kernels(lambda x: route(x, top_k=3, backend="xla"), logits)


def test_an_unknown_backend_and_an_unknown_number_of_tokens_are_refused():
    with pytest.raises(BackendError, match="backend must be None or one of"):
        route(jnp.zeros((2, 8)), top_k=1, backend="cuda")
    [tokens] = jax.export.symbolic_shape("tokens")
    rows = jax.ShapeDtypeStruct((tokens, 8), jnp.float32)
    with pytest.raises(BackendError, match="needs a known number of tokens"):
        jax.eval_shape(lambda x: route(x, top_k=1, backend="triton"), rows)
    exported = jax.export.export(jax.jit(lambda x: route(x, top_k=2)))(rows)
    assert exported.call(np.float32([[0, 3, 1, 2, 0, 0, 0, 0]]))[0].tolist() == [[1, 3]]
