"""Attention of one new token a row over a cache, from the parts of its products on.

`flash_decode` does all that lies between the products and the mean of the values: it adds the parts
of q, k and v, normalises and rotates heads, writes the new key and value into the cache, and walks
over the slots that the token sees, which several programs share. `flash_combine` joins what they
found (`pallas_kernels.triton.step.combine`). Where one program has all slots of a head, it finishes
by itself.

The new token's own key and value are never read from the cache: they are what the first split
starts from. So no program waits for another one's write, and no slot is read that is not seen.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.errors import BackendError
from pallas_kernels.formulas.norms import ROOT_KINDS, Norm
from pallas_kernels.formulas.rotation import Rotation
from pallas_kernels.tiles.attention.decode_rules import (
    Division,
    choose_division,
    find_seen,
    find_span,
    pad,
)
from pallas_kernels.tiles.device import find_device
from pallas_kernels.triton.parts import Parts, load_sum
from pallas_kernels.triton.step.combine import Partials, apply_gate, combine_splits, store_partials
from pallas_kernels.triton.step.heads import Features, load_head
from pallas_kernels.triton.step.slots import LOG2_E, Sums, finish_scores, walk_slots
from pallas_kernels.triton.walk import divide

Array = jax.Array

_DTYPES = (jnp.bfloat16, jnp.float16)
_LEAST_HEADS, _MOST_HEADS = 8, 16
"""Of one program: the short side of a tensor core, and what registers hold at D = 512."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is known when the kernel is compiled.

    Attributes:
      group: query heads of a key head.
      window: how many slots a token sees, its own among them; None for all.
      scale, softcap: of the scores, see `pallas_kernels.formulas.heads.Heads`.
    """

    kv_heads: int
    group: int
    features: Features
    window: int | None
    gated: bool
    scale: float
    softcap: float | None = None

    @property
    def block_heads(self) -> int:
        """Query heads of one program, with padding."""
        return min(_MOST_HEADS, max(_LEAST_HEADS, pad(self.group)))

    @property
    def head_blocks(self) -> int:
        """Programs that share the queries of one key head."""
        return pl.cdiv(self.group, self.block_heads)

    @property
    def stride(self) -> int:
        """Features of a query from one head to the next."""
        return self.features.head_dim * (2 if self.gated else 1)


def attend_token(
    q: Parts,
    k: Parts,
    v: Parts,
    *,
    q_norm: Norm | None,
    k_norm: Norm | None,
    rotation: Rotation | None,
    position: Array,
    active: Array,
    cache_k: Array,
    cache_v: Array,
    kv_heads: int,
    window: int | None,
    gated: bool,
    paired: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    division: Division | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Attention of one new token in each row.

    Args:
      q: [B, H * D]; gated: [B, H * 2D], of each head D features of the query and D of its gate.
      k, v: [B, kv_heads * D].
      q_norm, k_norm: of each head, before it is rotated.
      rotation: cosines and sines [B, R / 2] of the position: the first R <= D features of a head
        are rotated. In the cache's dtype each product is rounded, in float32 only the result. Its
        scale is [B] in the cache's dtype. None rotates nothing.
      position: int32 [B], the slot of the new token.
      active: int32 [B], 0 for a row that takes no part: its cache stays as it is, whatever its
        position, and its result means nothing.
      cache_k, cache_v: [B * kv_heads, C, D], bfloat16 or float16; position p is in slot p.
      window: how many slots a token sees, its own among them; None for all.
      gated: the result is multiplied by sigmoid(gate).
      paired: neighbouring features are rotated together, and not the halves of the first R.
      scale, softcap: of the scores, see `pallas_kernels.formulas.heads.Heads`.
      division: None for the rule's choice.
      interpret: run as ordinary XLA operations, slowly but on any device, instead of on a GPU.

    Returns:
      [B, H * D] in the cache's dtype, and both caches, updated in place.

    Raises:
      BackendError: if sizes or dtypes do not fit.
    """
    lines, slots, head_dim = cache_k.shape
    stride = head_dim * (2 if gated else 1)
    task = Task(
        kv_heads=kv_heads,
        group=q.features // (stride * kv_heads),
        features=Features(head_dim, 0 if rotation is None else 2 * rotation.cos.shape[-1], paired),
        window=window,
        gated=gated,
        scale=head_dim**-0.5 if scale is None else scale,
        softcap=softcap,
    )
    _check(task, q, k, v, (q_norm, k_norm), position.shape[0], cache_k, cache_v)
    if division is None:
        programs = lines * task.head_blocks
        division = choose_division(programs, slots, head_dim, head_dim, find_device())
    result, cache_k, cache_v = attend_splits(
        (q, k, v),
        (q_norm, k_norm),
        rotation,
        (position, active),
        (cache_k, cache_v),
        task,
        division,
        interpret=interpret,
    )
    if isinstance(result, Partials):
        result = combine_splits(
            result,
            position,
            active,
            window=window,
            gate=q if gated else None,
            dtype=cache_k.dtype,
            interpret=interpret,
        )
    return result.reshape(position.shape[0], -1), cache_k, cache_v


def _check(task: Task, q: Parts, k: Parts, v: Parts, norms, batch: int, cache_k, cache_v) -> None:
    head_dim, dtype = task.features.head_dim, cache_k.dtype
    wanted = [
        (dtype in _DTYPES, f"a cache of bfloat16 or float16, not {dtype.name}"),
        (cache_k.shape == cache_v.shape and dtype == cache_v.dtype, "two caches of one shape"),
        (cache_k.shape[0] == batch * task.kv_heads, "a line of the cache for each key head"),
        (task.group >= 1, "at least one query head for each key head"),
        (q.features == task.kv_heads * task.group * task.stride, "whole heads of q"),
        (k.features == v.features == task.kv_heads * head_dim, "a key and a value a key head"),
        (task.features.rotated <= head_dim, "at most D rotated features"),
        (all(n is None or n.kind in ROOT_KINDS for n in norms), f"norms of a kind in {ROOT_KINDS}"),
        (task.window is None or task.window >= 1, "a window of at least one slot"),
    ]
    if faults := [what for fits, what in wanted if not fits]:
        raise BackendError(f"decode attention takes {'; '.join(faults)}")


def attend_splits(
    projected: tuple[Parts, Parts, Parts],
    norms: tuple[Norm | None, Norm | None],
    rotation: Rotation | None,
    places: tuple[Array, Array],
    caches: tuple[Array, Array],
    task: Task,
    division: Division,
    *,
    interpret: bool = False,
) -> tuple[Partials | Array, Array, Array]:
    """The first kernel alone; arguments as `attend_token`.

    Returns:
      `Partials`, or the finished result [B * H, D] if there is one split; and both caches.
    """
    batch, dtype = places[0].shape[0], caches[0].dtype
    heads, head_dim = batch * task.kv_heads * task.group, task.features.head_dim
    if division.splits > 1:
        result: Any = Partials.describe(heads, division.splits, head_dim)
    else:
        result = jax.ShapeDtypeStruct((heads, head_dim), dtype)
    kinds = [None if norm is None else dataclasses.replace(norm, weight=None) for norm in norms]
    weights = [None if norm is None else norm.weight for norm in norms]
    tables, scale = (
        (None, None) if rotation is None else ((rotation.cos, rotation.sin), rotation.scale)
    )
    *caches_out, result = pl.pallas_call(
        functools.partial(_attend_split, kinds=kinds, task=task, division=division),
        out_shape=(*(jax.ShapeDtypeStruct(c.shape, dtype) for c in caches), result),
        grid=(caches[0].shape[0] * task.head_blocks * division.splits,),
        input_output_aliases={0: 0, 1: 1},
        compiler_params=plgpu.CompilerParams(num_warps=division.warps, num_stages=division.stages),
        interpret=interpret,
        name="flash_decode",
    )(
        *caches,
        projected,
        weights,
        tables if task.features.rotated else None,
        scale,
        places,
    )
    return result, *caches_out


def _attend_split(
    keys_ref,
    values_ref,
    projected,
    weights,
    rotation,
    scale_ref,
    places,
    new_keys_ref,
    new_values_ref,
    result,
    *,
    kinds,
    task: Task,
    division: Division,
) -> None:
    """The heads of one program over the slots of one split.

    Blocks of heads run fastest, so that programs which read the same keys meet in the cache.
    """
    rest, head_block = divide(pl.program_id(0), task.head_blocks)
    line, split = divide(rest, division.splits)
    row, kv_head = divide(line, task.kv_heads)
    position, active = (ref[row] for ref in places)
    q, k, v = projected
    q_norm, k_norm = (
        None if kind is None else dataclasses.replace(kind, weight=weight)
        for kind, weight in zip(kinds, weights, strict=True)
    )
    features, dtype = task.features, keys_ref.dtype
    is_first = split == 0
    mine = head_block * task.block_heads + jnp.arange(task.block_heads, dtype=jnp.int32)
    there = mine < task.group
    heads = kv_head * task.group + mine
    # heads past the last compute what the last does; their numbers stay their own, since of two
    # interpreted stores to one place either may win, masked or not
    starts = jnp.where(there, heads, kv_head * task.group + (task.group - 1)) * task.stride
    first_feature = jnp.full((1, 1), kv_head * features.head_dim, jnp.int32)
    column = features.own[0]

    query = load_head(q, row, starts[:, None], features, rotation, q_norm, dtype)
    if scale_ref is not None:
        query = (query.astype(jnp.float32) * scale_ref[row].astype(jnp.float32)).astype(dtype)
    key = load_head(k, row, first_feature, features, rotation, k_norm, dtype, is_first)
    mask = features.inside[0]
    value = load_sum(v, row, first_feature[0] + column, mask & is_first).astype(dtype)

    span = find_span(*find_seen(position, active, task.window), division.splits, split)

    def load_slots(ref):
        def load(slots: Array, seen: Array) -> Array:
            at = ref.at[line, slots[:, None], column[None, :]]
            return plgpu.load(at, mask=seen[:, None] & mask[None, :], other=0)

        return load

    scale = task.scale * LOG2_E
    sums = walk_slots(
        span,
        division.block,
        [query],
        lambda slots, seen: [load_slots(keys_ref)(slots, seen)],
        lambda slots, seen, _: load_slots(values_ref)(slots, seen),
        scale,
        _start_sums(query, key, value, scale, task.softcap, is_first),
        task.softcap,
    )
    numbers = row * (task.kv_heads * task.group) + heads
    if isinstance(result, Partials):

        @pl.when(span.works)
        def store() -> None:
            store_partials(result, sums, numbers, there, split)
    else:
        _finish(result, sums, q, row, numbers, starts, there, task)

    @pl.when(is_first & (head_block == 0) & (active != 0))
    def write() -> None:
        plgpu.store(new_keys_ref.at[line, position, column], key[0], mask=mask)
        plgpu.store(new_values_ref.at[line, position, column], value, mask=mask)


def _start_sums(
    query: Array,
    key: Array,
    value: Array,
    scale: float,
    softcap: float | None,
    is_first: Array,
) -> Sums:
    """Of the new token alone in the first split, of no slot in the others."""
    products = query.astype(jnp.float32) * key.astype(jnp.float32)
    scores = finish_scores(jnp.sum(products, axis=1), scale, softcap)
    total = jnp.where(is_first, jnp.ones_like(scores), jnp.zeros_like(scores))
    largest = jnp.where(is_first, scores, jnp.full_like(scores, -jnp.inf))
    # in the others the value was not loaded, so it is 0
    mixed = jnp.broadcast_to(value.astype(jnp.float32)[:, None], (value.size, scores.size))
    return Sums(largest, total, mixed)


def _finish(
    out_ref: Any,
    sums: Sums,
    q: Any,
    row: Array,
    numbers: Array,
    starts: Array,
    there: Array,
    task: Task,
) -> None:
    """Write the result of heads that have no other split."""
    column = task.features.own[0][:, None]
    mask = there[None, :] & (column < task.features.head_dim)
    mean = (sums.mixed / sums.total[None, :]).astype(out_ref.dtype)
    if task.gated:
        gates = starts[None, :] + task.features.head_dim + column
        mean = apply_gate(mean, q, row, gates, mask)
    plgpu.store(out_ref.at[numbers[None, :], column], mean, mask=mask)
