"""`route` against an independent enumeration in Python's own floats, and where numbers end."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pallas_kernels import SpecError, route
from pallas_kernels.formulas.routing_options import GROUP_SCORES, Routing
from pallas_kernels.formulas.routing_scores import SCORINGS
from tests.grids import sample

U = 2.0**-24
INF, NAN = math.inf, math.nan
# few values, so that many experts are equal; sums of a score and a bias differ between others
LOGITS = (-3.0, -1.25, 0.0, 0.5, 2.0)
BIASES = (-0.7, 0.0, 0.011, 0.4)


OPTIONS = [field.name for field in dataclasses.fields(Routing)]
run_compiled = jax.jit(route, static_argnames=OPTIONS)


@functools.partial(jax.jit, static_argnames=OPTIONS)
def find_slopes(logits, bias, probe, **options):
    """The slopes of the sum of a token's weights times the probe: of the logits, of the bias."""

    def loss(logits, bias):
        return (route(logits, correction_bias=bias, **options)[1] * probe).sum()

    return jax.grad(loss, argnums=(0, 1))(logits, bias)


def divide_powers(logits: list[float]) -> list[float]:
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / math.fsum(powers) for power in powers]


SCORES = {
    "softmax": divide_powers,
    "sigmoid": lambda logits: [1 / (1 + math.exp(-logit)) for logit in logits],
    "sqrt_softplus": lambda logits: [math.sqrt(math.log1p(math.exp(logit))) for logit in logits],
}
COUNTED = {"max": 1, "top2_sum": 2}
"""How many of its best experts a group is as good as."""


def test_the_enumeration_knows_every_name_there_is():
    assert SCORES.keys() == SCORINGS.keys()
    assert COUNTED.keys() == GROUP_SCORES.keys()


def pick(values: dict[int, float], count: int) -> list[int]:
    """The keys of the largest values, one after the other, the lower key of equal ones first."""
    chosen = []
    for _ in range(count):
        best = None
        for key in sorted(values.keys() - set(chosen)):
            if best is None or values[key] > values[best]:
                best = key
        chosen.append(best)
    return chosen


def route_slowly(
    logits: list[float], routing: Routing, bias: list[float] | None
) -> tuple[list[int], list[float], float]:
    """One token's experts, weights, and the smallest difference that its choice hangs on.

    Equal logits with equal biases are exactly equal, here as in float32.
    """
    scores = SCORES[routing.scoring](logits)
    choice = dict(enumerate(scores if bias is None else map(sum, zip(scores, bias, strict=True))))
    size, qualities = len(logits) // routing.groups, {}
    for group in range(routing.groups):
        members = sorted((choice[group * size + i] for i in range(size)), reverse=True)
        qualities[group] = sum(members[: COUNTED[routing.group_score]])
    kept = pick(qualities, routing.top_groups)
    ids = pick({e: c for e, c in choice.items() if e // size in kept}, routing.top_k)
    weights = [scores[e] for e in ids]
    if routing.renormalize:
        weights = [weight / (math.fsum(weights) + 1e-20) for weight in weights]
    gap = min(find_gap(choice.values()), find_gap(qualities.values()))
    return ids, [weight * routing.scaling_factor for weight in weights], gap


def find_gap(values) -> float:
    distinct = sorted(set(values))
    return min((b - a for a, b in itertools.pairwise(distinct)), default=INF)


def assert_routed(found, rows, routing: Routing, bias) -> None:
    """Ids are identical, in order. Weights: a score is good to 16 u (exp, log and logistic to 4 u
    and at most 8 operations, of 24 experts' sum 24 u more); the sum of k and a quotient add k + 4.
    """
    ids, weights = found
    assert (ids.dtype, weights.dtype) == (jnp.int32, jnp.float32)
    assert ids.shape == weights.shape == (len(rows), routing.top_k)
    for row, some_ids, some_weights in zip(rows, ids.tolist(), weights.tolist(), strict=True):
        expected_ids, expected, _ = route_slowly(row, routing, bias)
        assert some_ids == expected_ids
        np.testing.assert_allclose(some_weights, expected, rtol=(84 + routing.top_k) * U, atol=0)


@st.composite
def draw_routings(draw, scoring: str):
    """A routing, and rows of logits and a bias for as many experts as it takes."""
    # few shapes, for each of which every operation is compiled once
    size, groups = draw(st.sampled_from((1, 2, 4))), draw(st.integers(1, 3))
    top_groups = draw(st.integers(1, groups))
    routing = Routing(
        top_k=draw(st.integers(1, top_groups * size)),
        scoring=scoring,
        renormalize=draw(st.booleans()),
        groups=groups,
        top_groups=top_groups,
        group_score=draw(st.sampled_from([name for name in GROUP_SCORES if COUNTED[name] <= size])),
        scaling_factor=draw(st.sampled_from((1.0, 2.5))),
    )
    many = {"min_size": size * groups, "max_size": size * groups}
    row = st.lists(st.sampled_from(LOGITS), **many)
    bias = draw(st.none() | st.lists(st.sampled_from(BIASES), **many))
    return routing, draw(row), bias


@pytest.mark.parametrize("scoring", SCORINGS)
def test_every_choice_is_that_of_the_enumeration(scoring):
    seen = set()

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(draw_routings(scoring))
    def hold(drawn):
        routing, row, bias = drawn
        # float32 cannot turn around what differs by more than this
        assume(route_slowly(row, routing, bias)[2] > 1e-5)
        array = None if bias is None else jnp.asarray(bias, jnp.float32)
        found = route(jnp.asarray([row]), correction_bias=array, **vars(routing))
        assert_routed(found, [row], routing, bias)
        seen.add((routing.groups > routing.top_groups, routing.group_score, bias is None))

    hold()
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("top_k", "groups"), sample(itertools.product(range(1, 9), (1, 4)), every=3)
)
def test_any_number_of_experts_is_chosen_under_jit(top_k, groups):
    routing = Routing(
        top_k=top_k, scoring="sigmoid", groups=groups, top_groups=groups, group_score="top2_sum"
    )
    rng = np.random.default_rng(top_k)
    rows, bias = rng.choice(LOGITS, (32, 8)).tolist(), rng.choice(BIASES, 8).tolist()
    found = run_compiled(jnp.asarray(rows), correction_bias=jnp.asarray(bias), **vars(routing))
    assert_routed(found, rows, routing, bias)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_of_equal_experts_and_groups_the_lower_number_comes_first(scoring, compiled):
    def run(row, **options):
        call = run_compiled if compiled else route
        return call(jnp.asarray(row), scoring=scoring, **options)[0].tolist()

    assert run([0.5] * 40, top_k=40) == list(range(40))
    assert run([1.0, 2.0, 1.0, 2.0, 2.0, 1.0], top_k=5) == [1, 3, 4, 0, 2]
    assert run([1.0, 2.0, 2.0, 1.0, 2.0, 0.0], top_k=2, groups=3) == [1, 0]
    assert run([0.0, 1.0, 2.0, 1.0, 1.0, 2.0], top_k=3, groups=3, top_groups=2) == [2, 5, 3]
    sums = {"groups": 3, "group_score": "top2_sum"}
    assert run([0.0, 1.0, 2.0, 1.0, 1.0, 2.0], top_k=2, **sums) == [2, 3]


def test_sigmoids_that_round_to_one_are_equal():
    ids, weights = route(jnp.float32([18, 30, 25, 99]), top_k=2, scoring="sigmoid")
    assert ids.tolist() == [0, 1]
    assert weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("scoring", "row"),
    [(scoring, [1, NAN, 2, 3]) for scoring in SCORINGS]
    # the other NaN, with a sign, which some orders put last and some first
    + [("sigmoid", [1, 2, 3, -NAN]), ("sigmoid", [NAN] * 4)]
    + [("softmax", [1, 2, INF, 3]), ("softmax", [-INF] * 4), ("sqrt_softplus", [1, 2, INF, 3])],
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_token_with_a_broken_score_has_weights_of_nan_and_spoils_no_other(
    scoring, row, compiled, groups
):
    run = functools.partial(
        run_compiled if compiled else route, top_k=2, scoring=scoring, groups=groups
    )
    logits = np.float32([[0, 3, 1, 2], row, [5, 1, 1, 7]])
    ids, weights = run(jnp.asarray(logits))
    logits[1] = 0
    others, other_weights = run(jnp.asarray(logits))
    assert ids[1].tolist() == [0, 1]
    assert np.isnan(weights[1]).all()
    np.testing.assert_array_equal(np.asarray(ids)[::2], np.asarray(others)[::2])
    np.testing.assert_array_equal(np.asarray(weights)[::2], np.asarray(other_weights)[::2])
    assert np.isfinite(other_weights).all()


def test_a_bias_of_nan_breaks_every_token():
    ids, weights = route(jnp.zeros((2, 3)), top_k=1, correction_bias=jnp.float32([0, NAN, 0]))
    assert ids.tolist() == [[0], [0]]
    assert np.isnan(weights).all()


@pytest.mark.parametrize(
    ("scoring", "row", "expected_ids", "expected"),
    [
        ("softmax", [-INF, 1, -INF, 1], [1, 3, 0], [0.5, 0.5, 0]),
        ("sigmoid", [-INF, 0, INF, 0], [2, 1, 3], [0.5, 0.25, 0.25]),
        ("sigmoid", [-INF] * 4, [0, 1, 2], [0, 0, 0]),
        ("sqrt_softplus", [-INF, -INF, -INF, 2], [3, 0, 1], [1, 0, 0]),
        ("softmax", [3e38, -3e38, 0, 0], [0, 1, 2], [1, 0, 0]),
    ],
)
def test_other_infinite_logits_are_zero_and_one(scoring, row, expected_ids, expected):
    ids, weights = route(jnp.float32(row), top_k=3, scoring=scoring)
    assert ids.tolist() == expected_ids
    np.testing.assert_array_equal(weights, np.float32(expected))


def test_an_infinite_bias_is_first_or_last_of_its_group():
    def run(bias, **options):
        logits = jnp.float32([1, 0, 3, 2])
        return route(
            logits,
            top_k=2,
            scoring="sigmoid",
            renormalize=False,
            correction_bias=jnp.float32(bias),
            **options,
        )

    assert run([0, INF, 0, 0])[0].tolist() == [1, 2]
    assert run([0, 0, -INF, -INF])[0].tolist() == [0, 1]
    ids, weights = run([0, 0, 0, -INF], groups=2)
    assert ids.tolist() == [2, 3]
    np.testing.assert_allclose(weights, [1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-2))], rtol=1e-6)
    # the sum of both is 0, and not NaN: the other group is better
    assert run([0, 0, INF, -INF], groups=2, group_score="top2_sum")[0].tolist() == [0, 1]
    assert run([0, -INF, INF, 0], groups=2, group_score="top2_sum")[0].tolist() == [2, 3]


def test_leading_dimensions_and_vmap():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32))
    options = {"top_k": 3, "scoring": "sigmoid", "groups": 4, "top_groups": 2}
    bias = jnp.asarray(np.linspace(0, 1, 8, dtype=np.float32))
    run = functools.partial(run_compiled, correction_bias=bias, **options)
    whole, flat = run(logits), run(logits.reshape(6, 8))
    for found, other in ((jax.vmap(run)(logits), flat), (whole, flat), (run(logits[1, 2]), flat)):
        for ours, theirs in zip(found, other, strict=True):
            expected = theirs[5] if ours.ndim == 1 else theirs.reshape(2, 3, 3)
            np.testing.assert_array_equal(ours, expected)
    assert run(logits[:, :0])[1].shape == (2, 0, 3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_routed_in_float32(dtype):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 16)), dtype)
    bias = jnp.asarray(np.linspace(-1, 1, 16), dtype)
    found = route(logits, top_k=4, scoring="sigmoid", correction_bias=bias)
    wide = logits.astype(jnp.float32), bias.astype(jnp.float32)
    expected = route(wide[0], top_k=4, scoring="sigmoid", correction_bias=wide[1])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("level", [0.0, -50.0])
def test_weights_have_the_slope_of_the_enumeration(scoring, renormalize, level):
    """Central differences of step d in float64 err by d^2 and 1e-16 / d times numbers below 10.

    A level of -50 brings the sum of sigmoids below 1e-19, whose square float32 does not hold.
    """
    row = [level + x for x in (0.3, -1.2, 0.9, 0.1, -0.4, 1.7, 0.2, -2.0)]
    routing = Routing(
        top_k=3,
        scoring=scoring,
        renormalize=renormalize,
        groups=4,
        top_groups=2,
        scaling_factor=2.5,
    )
    probe = [1.0, -2.0, 0.7]

    def loss_slowly(row):
        return math.fsum(
            map(math.prod, zip(route_slowly(row, routing, None)[1], probe, strict=True))
        )

    slope, bias_slope = find_slopes(
        jnp.asarray(row), jnp.zeros(8), jnp.asarray(probe), **vars(routing)
    )
    d, expected = 1e-4, []
    for i in range(8):
        up, down = ([*row[:i], row[i] + step, *row[i + 1 :]] for step in (d, -d))
        expected.append((loss_slowly(up) - loss_slowly(down)) / (2 * d))
    # float32: 256 u of the largest, and what rounding moves logits as large as the level
    scale = np.abs(expected).max()
    np.testing.assert_allclose(slope, expected, rtol=0, atol=(256 + 4 * abs(level)) * U * scale)
    assert scale > 0
    assert not np.any(bias_slope)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("rest", [-60.0, -200.0, -3e38, -INF])
def test_vanished_scores_have_finite_slopes(scoring, renormalize, rest):
    probe, options = jnp.float32([1, 2, 3]), {"scoring": scoring, "renormalize": renormalize}

    def find_slope(row):
        return find_slopes(jnp.float32(row), None, probe, top_k=3, **options)[0]

    assert np.isfinite(find_slope([rest, 1, rest, rest])).all()
    if scoring != "softmax" or rest > -INF:
        assert np.isfinite(find_slope([rest] * 4)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_k": 2.0}, "top_k must be an integer of at least 1, got 2.0"),
        ({"top_k": 9}, r"top_k = 9 must be at most 8 \(top_groups = 1, groups of 8 experts\)"),
        (
            {"top_k": 5, "groups": 4, "top_groups": 2},
            r"top_k = 5 must be at most 4 \(top_groups = 2, groups of 2 experts\)",
        ),
        ({"groups": 3}, "groups = 3 must divide the 8 experts"),
        ({"groups": True}, "groups must be an integer of at least 1, got True"),
        ({"top_groups": 2}, "top_groups = 2 must be at most groups = 1"),
        ({"scoring": "tanh"}, r"scoring must be one of \('softmax', .* got 'tanh'"),
        ({"group_score": "mean"}, r"group_score must be one of \('max', .* got 'mean'"),
        ({"groups": 8, "group_score": "top2_sum"}, "needs groups of at least 2 experts, got 1"),
        ({"renormalize": 1}, "renormalize must be True or False, got 1"),
        ({"scaling_factor": "2"}, "scaling_factor must be a number, got '2'"),
        ({"scaling_factor": NAN}, "scaling_factor must be finite, got nan"),
        ({"top_k": 0, "groups": 0}, "top_k must .*; groups must"),
        ({"correction_bias": jnp.zeros(7)}, r"correction_bias must be float \[8\], .* \[7\]"),
        ({"correction_bias": np.arange(8)}, r"correction_bias must be float \[8\], got int32"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        route(jnp.zeros((2, 8)), **({"top_k": 1} | options))


@pytest.mark.parametrize("logits", [jnp.zeros((2, 8), jnp.int32), jnp.float32(1)])
def test_logits_are_floats_of_every_expert(logits):
    with pytest.raises(SpecError, match=r"router_logits must be float \[\.\.\., E\], got"):
        route(logits, top_k=1)


def test_a_routing_is_a_static_argument():
    routing = Routing(top_k=2, scoring="sigmoid")
    assert hash(routing) == hash(Routing(top_k=2, scoring="sigmoid"))
    assert routing != Routing(top_k=2)
    run = jax.jit(lambda x, r: route(x, **vars(r)), static_argnums=1)
    assert run(jnp.float32([1, 3, 2]), routing)[0].tolist() == [1, 2]
