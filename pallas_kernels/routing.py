"""`route` chooses each token's experts and their weights, in float32.

    scores   s = softmax(logits) | sigmoid(logits) | sqrt(softplus(logits))
    choice   c = s + correction_bias
    groups   consecutive experts form `groups` groups; the score of a group is its largest c, or
             the sum of its two largest; only experts of the best `top_groups` groups remain
    chosen   the top_k remaining experts of largest c
    weights  s of the chosen, divided by their sum if `renormalize`, times `scaling_factor`

Mixtral and Qwen-MoE are softmax without groups; DeepSeek-V2 (https://arxiv.org/abs/2405.04434) is
softmax with groups by their best; DeepSeek-V3 (https://arxiv.org/abs/2412.19437) is sigmoid with a
correction bias and groups by their two best. A softmax over the chosen alone (gpt-oss) is softmax
with `renormalize`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.errors import SpecError

_TINY = 1e-20  # avoids a division by 0 if all scores are 0, as in DeepSeek's code
_LIFT = 2.0**40  # changes no rounding; keeps the square of `_TINY`, in the derivative, above 0


def _root_softplus(logits: jax.Array) -> jax.Array:
    positive = jax.nn.softplus(logits)
    # the derivative of a square root is infinite at 0, which would make NaN of a vanished score's
    vanished = positive == 0
    return jnp.where(vanished, 0.0, jnp.sqrt(jnp.where(vanished, 1.0, positive)))


def _add_best_two(choice: jax.Array) -> jax.Array:
    return lax.top_k(choice, 2)[0].sum(-1)


SCORINGS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": lambda logits: jax.nn.softmax(logits, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "sqrt_softplus": _root_softplus,
}
"""Name -> the scores of logits, float32 [..., E] both."""


class GroupScore(NamedTuple):
    """How good a group of experts is: `rate` makes [..., groups] of c [..., groups, experts].

    Attributes:
      least: how many experts a group must have.
    """

    rate: Callable[[jax.Array], jax.Array]
    least: int


GROUP_SCORES = {
    "max": GroupScore(lambda choice: choice.max(-1), least=1),
    "top2_sum": GroupScore(_add_best_two, least=2),
}
"""Name -> how groups are compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """The options of `route`, hashable.

    Attributes:
      top_k: experts of a token.
      scoring: one of `SCORINGS`.
      renormalize: whether the weights of a token add up to `scaling_factor`.
      groups: number of groups; each is a run of consecutive experts.
      top_groups: how many of the groups a token may choose from.
      group_score: one of `GROUP_SCORES`.
      scaling_factor: multiplies the weights.

    Raises:
      SpecError: if a value is impossible.
    """

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    scaling_factor: float = 1.0

    def __post_init__(self):
        faults = [
            f"{name} must be an integer of at least 1, got {getattr(self, name)!r}"
            for name in ("top_k", "groups", "top_groups")
            if type(getattr(self, name)) is not int or getattr(self, name) < 1
        ]
        for name, table in (("scoring", SCORINGS), ("group_score", GROUP_SCORES)):
            names, found = tuple(table), getattr(self, name)
            if found not in names:
                faults.append(f"{name} must be one of {names}, got {found!r}")
        if not isinstance(self.renormalize, bool):
            faults.append(f"renormalize must be True or False, got {self.renormalize!r}")
        factor = self.scaling_factor
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            faults.append(f"scaling_factor must be a number, got {factor!r}")
        elif not math.isfinite(factor):
            faults.append(f"scaling_factor must be finite, got {factor!r}")
        if not faults and self.top_groups > self.groups:
            faults.append(f"top_groups = {self.top_groups} must be at most groups = {self.groups}")
        if faults:
            raise SpecError("; ".join(faults))

    def check_experts(self, experts: int) -> None:
        """Raise a SpecError unless these options fit `experts` experts."""
        if experts % self.groups:
            raise SpecError(f"groups = {self.groups} must divide the {experts} experts")
        size = experts // self.groups
        if self.top_k > self.top_groups * size:
            raise SpecError(
                f"top_k = {self.top_k} must be at most {self.top_groups * size} "
                f"(top_groups = {self.top_groups}, groups of {size} experts)"
            )
        least = GROUP_SCORES[self.group_score].least
        if self.groups > 1 and size < least:
            raise SpecError(
                f"group_score {self.group_score!r} needs groups of at least {least} experts, "
                f"got {size}"
            )


def route(
    router_logits: jax.Array,
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    correction_bias: jax.Array | None = None,
    scaling_factor: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Choose the experts of every token. `Routing` explains the options, the module the formulas.

    Differentiable with respect to the logits through the weights. Of equal experts or groups, the
    lower number comes first. Experts are equal if their float32 c is equal, even if their logits
    differ (from 18 on every sigmoid is 1).

    A token with a NaN or infinite score, or a NaN in c, gets the experts 0 .. top_k - 1 with NaN
    weights, so that it is noticed. The cause is a NaN in its logits or in `correction_bias`, a
    logit of +inf under softmax or sqrt_softplus, or logits that are all -inf under softmax. In all
    other cases a logit of -inf gives a score of 0, and +inf under sigmoid a score of 1. An expert
    with a bias of -inf is the last of its group, one with +inf the first.

    Args:
      router_logits: float [..., E].
      correction_bias: float [E], added to the scores for the choice only.

    Returns:
      ids int32 [..., top_k], best first, and weights float32 [..., top_k].

    Raises:
      SpecError: if options and shapes contradict each other.

    Example:
      ```python
      logits = jnp.asarray([[0.0, 3.0, 1.0, 2.0]])
      ids, weights = jaxwna16.route(logits, top_k=2)
      assert ids.tolist() == [[1, 3]]
      assert abs(weights.sum() - 1) < 1e-6
      ```
    """
    routing = Routing(
        top_k=top_k,
        scoring=scoring,
        renormalize=renormalize,
        groups=groups,
        top_groups=top_groups,
        group_score=group_score,
        scaling_factor=scaling_factor,
    )
    logits = jnp.asarray(router_logits)
    if logits.ndim < 1 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise SpecError(
            f"router_logits must be float [..., E], got {logits.dtype} {list(logits.shape)}"
        )
    experts = logits.shape[-1]
    routing.check_experts(experts)
    scores = SCORINGS[scoring](logits.astype(jnp.float32))
    choice = lax.stop_gradient(scores)
    if correction_bias is not None:
        bias = jnp.asarray(correction_bias)
        if bias.shape != (experts,) or not jnp.issubdtype(bias.dtype, jnp.floating):
            raise SpecError(
                f"correction_bias must be float [{experts}], got {bias.dtype} {list(bias.shape)}"
            )
        bias = lax.stop_gradient(bias).astype(jnp.float32)
        choice = choice + jnp.expand_dims(bias, range(choice.ndim - 1))
    broken = (~jnp.isfinite(scores) | jnp.isnan(choice)).any(-1, keepdims=True)
    # Finite, so that two biases never add up to NaN, and only experts of other groups are -inf.
    # Where broken, all are equal: so the first are chosen, whatever a device's top_k does with NaN.
    finite = jnp.finfo(jnp.float32)
    choice = jnp.where(broken, 0.0, jnp.clip(choice, finite.min, finite.max))
    if groups > top_groups:
        choice = _mask_groups(choice, routing)
    ids = lax.top_k(choice, top_k)[1]
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if renormalize:
        lifted = weights * _LIFT
        weights = lifted / (lifted.sum(-1, keepdims=True) + _TINY * _LIFT)
    return ids, jnp.where(broken, jnp.nan, weights * scaling_factor)


def _mask_groups(choice: jax.Array, routing: Routing) -> jax.Array:
    """-inf for experts outside the best groups."""
    size = choice.shape[-1] // routing.groups
    grouped = choice.reshape(*choice.shape[:-1], routing.groups, size)
    quality = GROUP_SCORES[routing.group_score].rate(grouped)
    best = lax.top_k(quality, routing.top_groups)[1]
    groups = jnp.expand_dims(jnp.arange(routing.groups, dtype=best.dtype), range(best.ndim))
    kept = (best[..., None] == groups).any(-2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
