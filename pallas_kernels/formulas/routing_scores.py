"""The formulas of `pallas_kernels.step.routing.route`, on float32, which a kernel can use, too."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

_TINY = 1e-20  # avoids a division by 0 if all scores are 0, as in DeepSeek's code
_LIFT = 2.0**40  # changes no rounding; keeps the square of `_TINY`, in the derivative, above 0


def _root_softplus(logits: jax.Array) -> jax.Array:
    positive = jax.nn.softplus(logits)
    # the derivative of a square root is infinite at 0, which would make NaN of a vanished score's
    vanished = positive == 0
    return jnp.where(vanished, 0.0, jnp.sqrt(jnp.where(vanished, 1.0, positive)))


SCORINGS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": lambda logits: jax.nn.softmax(logits, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "sqrt_softplus": _root_softplus,
}
"""Name -> the scores of logits, float32 [..., E] both; a logit of -inf beside others scores 0."""


def clear_broken(scores: jax.Array, choice: jax.Array) -> tuple[jax.Array, jax.Array]:
    """c [..., E] without what cannot be compared, and which tokens are broken, bool [..., 1].

    Finite, so that two biases never add up to NaN, and only experts of other groups are -inf. Where
    broken, all are equal: so the first are chosen, whatever a device does with NaN.
    """
    unfit = ~(jnp.abs(scores) < jnp.inf) | (choice != choice)
    broken = unfit.astype(jnp.int32).max(-1, keepdims=True) > 0
    finite = jnp.finfo(jnp.float32)
    return jnp.where(broken, 0.0, jnp.clip(choice, finite.min, finite.max)), broken


def weigh(scores: jax.Array, broken: jax.Array, renormalize: bool, factor: float) -> jax.Array:
    """The weights of the chosen [..., top_k] by their scores; NaN where broken."""
    if renormalize:
        lifted = scores * _LIFT
        scores = lifted / (lifted.sum(-1, keepdims=True) + _TINY * _LIFT)
    return jnp.where(broken, jnp.nan, scores * factor)
