"""Two kernels of a decode step: a router's choice, and a token of the gated delta rule."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formulas.routing_options import GROUP_SCORES, Routing
from pallas_kernels.triton.step.delta_rule import step_delta_rule
from pallas_kernels.triton.step.routing import choose_experts
from tests.executed.bounds import DTYPES, Bounded, U
from tests.executed.work import Work
from tests.pallas_kernels import delta_rule
from tests.pallas_kernels.delta_rule import Sizes

_FACTOR = 2.5


@dataclasses.dataclass(frozen=True)
class Routed:
    """The choice of a few tokens, one of which is broken; `groups` keep half of themselves."""

    arch: str
    tokens: int
    experts: int
    top_k: int
    dtype: str
    scoring: str = "softmax"
    groups: int = 1
    group_score: str = "max"
    bias: bool = False
    renormalize: bool = True

    @property
    def kind(self) -> str:
        return "routing"

    def prepare(self) -> Work:
        """Few values, so that many experts are equal and others far from it."""
        rng = np.random.default_rng(self.experts)
        logits = rng.integers(-12, 13, (self.tokens, self.experts)) / 4
        logits = logits.astype(DTYPES[self.dtype])
        if self.tokens > 1:
            logits[-1, self.experts // 2] = np.nan
        bias = None
        if self.bias:
            bias = rng.choice([-0.4, 0.0, 0.3], self.experts).astype(np.float32)
        routing = Routing(
            top_k=self.top_k,
            scoring=self.scoring,
            renormalize=self.renormalize,
            groups=self.groups,
            top_groups=max(1, self.groups // 2),
            group_score=self.group_score,
            scaling_factor=_FACTOR,
        )

        def run(logits, bias, interpret=False):
            return choose_experts(logits, routing, bias, interpret=interpret)

        ids, weights = self._expect(logits.astype(np.float64), bias, routing)
        arguments = jax.tree.map(jnp.asarray, (logits, bias))
        return Work(run, arguments, (ids, weights), _mark_missing, False)

    def _expect(self, logits, bias, routing: Routing) -> tuple[np.ndarray, Bounded]:
        """A weight passes an exponential of at most 6 in size, sums of E and k, and quotients."""
        # each value once, so that equal logits have equal scores
        values, places = np.unique(logits, return_inverse=True)
        scores = _SCORES[self.scoring](values)[places.reshape(logits.shape)]
        if self.scoring == "softmax":
            scores = scores / scores.sum(1, keepdims=True)
        choice = scores if bias is None else scores + bias
        ids = np.stack([_choose(row, routing) for row in choice])
        weights = np.take_along_axis(scores, ids, 1)
        if self.renormalize:
            weights = weights / weights.sum(1, keepdims=True)
        weights = np.where(np.isnan(logits).any(1, keepdims=True), -1.0, weights * _FACTOR)
        roundings = self.experts + self.top_k + 48
        error = np.where(weights < 0, 0.0, roundings * U * weights)
        return ids.astype(np.int32), Bounded(weights, error)


def _mark_missing(output: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(output), -1, output)


_SCORES = {
    "softmax": np.exp,
    "sigmoid": lambda logits: 1 / (1 + np.exp(-logits)),
    "sqrt_softplus": lambda logits: np.sqrt(np.log1p(np.exp(logits))),
}


def _choose(choice: np.ndarray, routing: Routing) -> np.ndarray:
    """The best experts of one token, the lower number of equal ones first."""
    if np.isnan(choice).any():
        return np.arange(routing.top_k)
    groups = choice.reshape(routing.groups, -1)
    best = np.sort(groups, 1)[:, ::-1][:, : GROUP_SCORES[routing.group_score]].sum(1)
    kept = _sort(best)[: routing.top_groups] if routing.groups > 1 else [0]
    group = np.arange(choice.size) // groups.shape[1]
    order = [expert for expert in _sort(choice) if group[expert] in kept]
    return np.array(order[: routing.top_k])


def _sort(values: np.ndarray) -> np.ndarray:
    """Numbers in falling order of their values.

    Raises:
      ValueError: if values are so near that a GPU's exponentials could exchange them.
    """
    distinct = np.unique(values)
    gaps, sizes = np.diff(distinct), np.maximum(np.abs(distinct[1:]), np.abs(distinct[:-1]))
    # a bias may cancel a score, whose error stays
    sizes = np.maximum(sizes, np.where((values < 0).any(), 1.0, 0.0))
    if (gaps < 64 * U * sizes).any():
        raise ValueError("scores too near to each other")
    return np.lexsort((np.arange(values.size), -values))


@dataclasses.dataclass(frozen=True)
class DeltaStep:
    """One token of each row, of which the second does not take part; see `Sizes`."""

    arch: str
    rows: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    width: int = 4
    parts: int = 1
    bias: bool = False

    @property
    def kind(self) -> str:
        return "delta rule"

    def prepare(self) -> Work:
        facts = dataclasses.asdict(self)
        del facts["arch"]
        sizes = Sizes(**facts)
        products, weights = delta_rule.draw_products(sizes, 3), delta_rule.draw_weights(sizes)
        inputs, state = delta_rule.draw_cache(sizes)
        active = (np.arange(self.rows) != 1).astype(np.int32)

        def run(products, weights, inputs, state, active, interpret=False):
            return step_delta_rule(
                *products,
                **weights,
                inputs=inputs,
                state=state,
                active=active,
                key_heads=self.key_heads,
                norm_eps=delta_rule.EPS,
                interpret=interpret,
            )

        held = delta_rule.exactly(state)
        y, fresh = delta_rule.step(sizes, products, weights, inputs, held, active)
        moved = delta_rule.shift_inputs(products[0], inputs, active)
        arguments = jax.tree.map(jnp.asarray, (products, weights, inputs, state, active))
        return Work(run, arguments, (y, moved, fresh), lambda output: output, False)
