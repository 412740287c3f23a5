"""The way of one program over its slots of a cache: softmax and weighted sum, block by block.

Some heads of queries share a line of keys. Scores are [slots, heads], so that slots are the long
side of the tensor cores and few heads the short one. A block moves the largest score up, and what
was summed before is scaled down to it (https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tiles.attention.decode_rules import Span, count_blocks

LOG2_E = math.log2(math.e)
"""Scores are times this: a power of two is one instruction."""


class Sums(NamedTuple):
    """What a softmax of some slots is made of, float32.

    Attributes:
      largest: [G], the largest score.
      total: [G], the sum of 2^(score - largest).
      mixed: [D, G], the sum of the same times the values.
    """

    largest: jax.Array
    total: jax.Array
    mixed: jax.Array

    @classmethod
    def start(cls, heads: int, features: int) -> Sums:
        """Of no slot."""
        zeros = jnp.zeros((heads,), jnp.float32)
        return cls(zeros - jnp.inf, zeros, jnp.zeros((features, heads), jnp.float32))


def walk_slots(
    span: Span,
    block: int,
    queries: Sequence[jax.Array],
    load_keys: Callable[[jax.Array, jax.Array], Sequence[jax.Array]],
    load_values: Callable[[jax.Array, jax.Array, Sequence[jax.Array]], jax.Array],
    scale: float,
    start: Sums,
    softcap: float | None = None,
) -> Sums:
    """Add the slots of a span to `start`; of no slot at all, if neither has any, it is NaN.

    Args:
      block: slots of one step.
      queries: [G, F] each: parts of the features, whose scores are added.
      load_keys: of slots int32 [block], and which of them are seen: their keys, [block, F] each.
      load_values: of the same, and of the keys (of which values may be a part): [block, D].
      scale: of the scores, with `LOG2_E`.
      softcap: as in `finish_scores`.
    """

    def take_step(i: jax.Array, sums: Sums) -> Sums:
        slots = span.first + i * block + jnp.arange(block, dtype=jnp.int32)
        seen = slots < span.end
        keys = load_keys(slots, seen)
        values = load_values(slots, seen, keys)
        scores = sum_all(
            [plgpu.dot(key, query.T) for key, query in zip(keys, queries, strict=True)]
        )
        seen = jnp.broadcast_to(seen[:, None], scores.shape)
        scores = jnp.where(seen, finish_scores(scores, scale, softcap), -jnp.inf)
        largest = jnp.maximum(sums.largest, jnp.max(scores, axis=0))
        weights = jnp.exp2(scores - largest[None, :])
        shrink = jnp.exp2(sums.largest - largest)
        total = sums.total * shrink + jnp.sum(weights, axis=0)
        added = plgpu.dot(values.T, weights.astype(values.dtype))
        return Sums(largest, total, sums.mixed * shrink[None, :] + added)

    # at least one: on sm_100 Triton reads the sums of the first step whether there is one or not
    steps = jnp.maximum(count_blocks(span, block), 1)
    return lax.fori_loop(0, steps, take_step, start)


def finish_scores(products: jax.Array, scale: float, softcap: float | None) -> jax.Array:
    """Scores as exponents of 2.

    Args:
      products: of queries and keys, float32.
      scale: with `LOG2_E`.
      softcap: without it; see `pallas_kernels.formulas.heads.Heads`.
    """
    scores = products * scale
    if softcap is None:
        return scores
    # c tanh(x) = c - 2 c / (1 + e^(2 x)): one power and a quotient; the same in any unit of scores
    limit = softcap * LOG2_E
    return limit - 2 * limit / (1 + jnp.exp2(scores * (2 * LOG2_E / limit)))


def sum_all(terms: Sequence[jax.Array]) -> jax.Array:
    """One after the other, without a zero before them."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
