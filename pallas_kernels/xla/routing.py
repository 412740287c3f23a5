"""`pallas_kernels.step.routing.route` as plain operations, differentiable through the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formulas.routing_options import GROUP_SCORES, Routing
from pallas_kernels.formulas.routing_scores import SCORINGS, clear_broken, weigh


def choose_experts(
    logits: jax.Array, routing: Routing, correction_bias: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Choose the experts of every token.

    Args:
      logits: float [T, E].
      correction_bias: float32 [E], or None.

    Returns:
      ids int32 [T, top_k], best first, and weights float32 [T, top_k].
    """
    scores = SCORINGS[routing.scoring](logits.astype(jnp.float32))
    choice = lax.stop_gradient(scores)
    if correction_bias is not None:
        choice = choice + lax.stop_gradient(correction_bias)[None, :]
    choice, broken = clear_broken(lax.stop_gradient(scores), choice)
    if routing.groups > routing.top_groups:
        choice = _mask_groups(choice, routing)
    ids = lax.top_k(choice, routing.top_k)[1]
    chosen = jnp.take_along_axis(scores, ids, axis=-1)
    return ids, weigh(chosen, broken, routing.renormalize, routing.scaling_factor)


def _mask_groups(choice: jax.Array, routing: Routing) -> jax.Array:
    """-inf for experts outside the best groups."""
    size = choice.shape[1] // routing.groups
    grouped = choice.reshape(choice.shape[0], routing.groups, size)
    quality = lax.top_k(grouped, GROUP_SCORES[routing.group_score])[0].sum(-1)
    best = lax.top_k(quality, routing.top_groups)[1]
    groups = jnp.arange(routing.groups, dtype=best.dtype)[None, None, :]
    kept = (best[..., None] == groups).any(-2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
