"""`pallas_kernels.step.routing.route` in one kernel.

As XLA fusions it would be about eight kernels, each waiting for the one before; for few tokens that
would take as long as reading the experts' weights. Here each token has a program of one warp, whose
reductions need neither shared memory nor a barrier.

Experts are compared by integers in the order of their floats, which one instruction reduces over a
warp. The best are taken one after the other: the largest value, then the lowest number that has it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.formulas.routing_options import GROUP_SCORES, Routing
from pallas_kernels.formulas.routing_scores import SCORINGS, clear_broken, weigh
from pallas_kernels.triton.walk import divide

_TAKEN = jnp.iinfo(jnp.int32).min
"""Below the key of every float: experts that cannot be chosen, or are already."""


def choose_experts(
    logits: jax.Array,
    routing: Routing,
    correction_bias: jax.Array | None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Choose the experts of every token, as `route`.

    Args:
      logits: float32, bfloat16 or float16 [T, E], T >= 1.
      routing: fits E, see `Routing.check_experts`.
      correction_bias: float32 [E], or None.

    Returns:
      ids int32 [T, top_k], best first, and weights float32 [T, top_k].
    """
    tokens = logits.shape[0]
    bias = {} if correction_bias is None else {"bias": correction_bias}
    return pl.pallas_call(
        functools.partial(_choose_one, routing=routing),
        out_shape=[
            jax.ShapeDtypeStruct((tokens, routing.top_k), dtype)
            for dtype in (jnp.int32, jnp.float32)
        ],
        grid=(tokens,),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="choose_experts",
    )(logits, bias)


def _choose_one(logits_ref, bias, ids_ref, weights_ref, *, routing: Routing) -> None:
    """Choose for one token.

    Experts lie in groups whose sizes are filled up to a power of two, and so is their number.
    """
    token, experts = pl.program_id(0), logits_ref.shape[1]
    is_limited = routing.groups > routing.top_groups
    groups = routing.groups if is_limited else 1
    size = experts // groups
    width = pl.next_power_of_2(size)
    places = jnp.arange(pl.next_power_of_2(groups) * width, dtype=jnp.int32)
    group, member = divide(places, width)
    numbers = group * size + member
    exists = (group < groups) & (member < size)
    # a logit of -inf has the score 0 and breaks no token
    logits = plgpu.load(logits_ref.at[token, numbers], mask=exists, other=-jnp.inf)
    scores = SCORINGS[routing.scoring](logits.astype(jnp.float32))
    choice = scores
    if bias:
        choice = choice + plgpu.load(bias["bias"].at[numbers], mask=exists, other=0.0)
    choice, broken = clear_broken(scores, choice)
    keys = jnp.where(exists, _make_keys(choice), _TAKEN)
    if is_limited:
        keys = _mask_groups(keys, group, routing)
    slots = jnp.arange(pl.next_power_of_2(routing.top_k), dtype=jnp.int32)
    # scores of experts that matter are at least 0, so they have the order of their bits
    bits = lax.bitcast_convert_type(scores, jnp.int32)

    def take(slot: jax.Array, carry: tuple) -> tuple:
        keys, ids, chosen = carry
        best, is_best = _take_best(keys, numbers)
        found = jnp.max(jnp.where(is_best, bits, 0))
        mine = slots == slot
        return (
            jnp.where(is_best, _TAKEN, keys),
            jnp.where(mine, best, ids),
            jnp.where(mine, found, chosen),
        )

    none = jnp.zeros_like(slots)
    _, ids, chosen = lax.fori_loop(0, routing.top_k, take, (keys, none, none))
    weights = weigh(
        lax.bitcast_convert_type(chosen, jnp.float32),
        broken,
        routing.renormalize,
        routing.scaling_factor,
    )
    plgpu.store(ids_ref.at[token, slots], ids, mask=slots < routing.top_k)
    plgpu.store(weights_ref.at[token, slots], weights, mask=slots < routing.top_k)


def _mask_groups(keys: jax.Array, group: jax.Array, routing: Routing) -> jax.Array:
    """`_TAKEN` for experts outside the best groups; `group` is the one that each stands in."""
    count = pl.next_power_of_2(routing.groups)
    grouped = keys.reshape(count, keys.size // count)
    members = jnp.arange(grouped.shape[1], dtype=jnp.int32)[None, :]
    quality = jnp.zeros(count, jnp.float32)
    for _ in range(GROUP_SCORES[routing.group_score]):
        largest = grouped.max(axis=1)
        quality = quality + _read_keys(largest)
        is_largest = grouped == largest[:, None]
        first = jnp.where(is_largest, members, grouped.shape[1]).min(axis=1)
        grouped = jnp.where(members == first[:, None], _TAKEN, grouped)
    numbers = jnp.arange(count, dtype=jnp.int32)
    qualities = jnp.where(numbers < routing.groups, _make_keys(quality), _TAKEN)

    def keep(_: jax.Array, carry: tuple) -> tuple:
        qualities, kept = carry
        best, is_best = _take_best(qualities, numbers)
        return jnp.where(is_best, _TAKEN, qualities), kept | (group == best)

    none = jnp.zeros_like(group) > 0
    _, kept = lax.fori_loop(0, routing.top_groups, keep, (qualities, none))
    return jnp.where(kept, keys, _TAKEN)


def _make_keys(values: jax.Array) -> jax.Array:
    """int32 in the order of float32 values, none of which is NaN or -0."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _read_keys(keys: jax.Array) -> jax.Array:
    """The values of `_make_keys`."""
    return lax.bitcast_convert_type(jnp.where(keys < 0, keys ^ 0x7FFFFFFF, keys), jnp.float32)


def _take_best(keys: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lowest number that has the largest key, and where it stands."""
    is_largest = keys == jnp.max(keys)
    best = jnp.min(jnp.where(is_largest, numbers, jnp.iinfo(jnp.int32).max))
    return best, is_largest & (numbers == best)
