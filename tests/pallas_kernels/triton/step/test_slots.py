"""The walk over slots with other keys and values: those of multi-head latent attention.

Its many query heads share one line of keys, which are two parts of different sizes, and its values
are the first of these parts, so that they are loaded once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tiles.attention.decode_rules import Division, find_seen, find_span
from pallas_kernels.triton.step.combine import Partials, combine_splits, store_partials
from pallas_kernels.triton.step.slots import LOG2_E, Sums, walk_slots
from pallas_kernels.triton.walk import divide
from tests.executed.bounds import Bounded
from tests.pallas_kernels.attention import attend_exactly

LATENT, ROTATED, HEADS, BLOCK_HEADS = 64, 16, 24, 16
SCALE = 0.1


def _attend_latent(query_ref, cache_ref, position_ref, active_ref, *refs, division: Division):
    blocks = pl.cdiv(HEADS, BLOCK_HEADS)
    rest, block = divide(pl.program_id(0), blocks)
    row, split = divide(rest, division.splits)
    mine = block * BLOCK_HEADS + jnp.arange(BLOCK_HEADS, dtype=jnp.int32)
    there = mine < HEADS
    parts = [jnp.arange(LATENT), LATENT + jnp.arange(ROTATED)]
    queries = [
        plgpu.load(query_ref.at[row, mine[:, None], part[None, :]], mask=there[:, None], other=0)
        for part in parts
    ]

    def load_keys(slots, seen):
        return [
            plgpu.load(
                cache_ref.at[row, slots[:, None], part[None, :]], mask=seen[:, None], other=0
            )
            for part in parts
        ]

    span = find_span(*find_seen(position_ref[row], active_ref[row], None), division.splits, split)
    sums = walk_slots(
        span,
        division.block,
        queries,
        load_keys,
        lambda slots, seen, keys: keys[0],
        SCALE * LOG2_E,
        Sums.start(BLOCK_HEADS, LATENT),
    )
    store_partials(Partials(*refs), sums, row * HEADS + mine, there, split)


@functools.partial(jax.jit, static_argnames="division")
def attend_latent(queries, cache, position, active, division: Division):
    """Absorbed queries [B, HEADS, F] over a cache [B, C, F]: [B, HEADS * LATENT]."""
    batch = position.size
    partials = pl.pallas_call(
        functools.partial(_attend_latent, division=division),
        out_shape=Partials.describe(batch * HEADS, division.splits, LATENT),
        grid=(batch * pl.cdiv(HEADS, BLOCK_HEADS) * division.splits,),
        interpret=True,
    )(queries, cache, position, active)
    return combine_splits(
        Partials(*partials), position, active, window=None, dtype=queries.dtype, interpret=True
    )


@pytest.mark.parametrize("splits", [1, 4])
def test_latent_attention_is_within_the_bound_of_float64(splits):
    rng, division = np.random.default_rng(0), Division(splits=splits, block=16)
    dtype, positions = np.dtype(ml_dtypes.bfloat16), np.array([90, 17, 3], np.int32)
    queries = 3 * rng.standard_normal((3, HEADS, LATENT + ROTATED))
    cache = rng.standard_normal((3, 100, LATENT + ROTATED)).astype(dtype)
    queries = queries.astype(dtype)
    for row, position in enumerate(positions):
        cache[row, position:] = np.nan
    found = attend_latent(queries, cache, positions, np.ones(3, np.int32), division)
    found = np.asarray(found).reshape(3, HEADS, LATENT)
    for row, head in np.ndindex(3, HEADS):
        keys = cache[row, : positions[row]].astype(np.float64)
        query = queries[row, head].astype(np.float64)
        value, error = attend_exactly(
            Bounded(query, np.zeros(query.shape)),
            Bounded(keys, np.zeros(keys.shape)),
            keys[:, :LATENT],
            SCALE,
            "bfloat16",
            division,
        )
        assert Bounded(value, error).round_to(dtype).measure(found[row, head]) <= 1
