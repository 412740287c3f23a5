"""How the slots of a cache are divided among programs, for attention of one new token a row.

Shapes alone decide how many splits there are, so that one program serves every position. Which
slots a split reads is decided at run time: those that are seen are shared out evenly.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tiles.device import Device

_GRANULE = 16
"""Slots that stay together: as many rows of values as a tensor core adds up at once."""

_MOST_SPLITS = 64
_LEAST_SLOTS = 128
"""Of a full cache, for each split. With less than two blocks nothing hides behind a load."""

_STAGES = 3
_STAGE = 32 * 1024
"""Bytes of a block: while one is used, two of them are under way, and most cores hold two programs
or three. That is some times what a core's share of the bandwidth brings within its latency."""

_TENSOR_ROWS = 64
"""Slots that four warps multiply at once. Fewer leave some of them idle."""

_OTHER_BYTES = 16 * 1024
"""Of shared memory: queries, weights, and what reductions exchange."""


@dataclasses.dataclass(frozen=True)
class Division:
    """How the work is divided.

    Attributes:
      splits: programs that share the slots of one row and key head.
      block: slots that a program reads at once.
      warps, stages: of a program, and of its copy pipeline.
    """

    splits: int
    block: int
    warps: int = 4
    stages: int = _STAGES


@dataclasses.dataclass(frozen=True)
class Span:
    """The slots of one split: `first` to `end`; whether there are any (or it is the first)."""

    first: jax.Array
    end: jax.Array
    works: jax.Array


def choose_division(
    lines: int, slots: int, key_features: int, value_features: int, device: Device
) -> Division:
    """Enough programs to keep every core busy, as long as each has something to read.

    Args:
      lines: programs without a split: rows of the batch times key heads (times blocks of heads).
      slots: C.
      key_features, value_features: of one slot, in 16 bits.
    """
    bytes_a_slot = 2 * (pad(key_features) + pad(value_features))
    block = min(128, max(_TENSOR_ROWS, _STAGE // bytes_a_slot))
    ahead = _STAGES - 1
    while ahead * block * bytes_a_slot > device.shared_memory - _OTHER_BYTES and block > _GRANULE:
        block //= 2
    wanted = max(1, 2 * device.cores // lines)
    most = max(1, slots // _LEAST_SLOTS)
    splits = min(_round_down(wanted), _round_down(most), _MOST_SPLITS)
    # many features leave room for one program a core, and fill the registers of four warps
    warps = 8 if bytes_a_slot >= 1024 else 4
    return Division(splits, min(block, max(_GRANULE, pad(slots))), warps)


def find_seen(
    position: jax.Array, active: jax.Array, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """The slots before the new token's that it sees, from the first to the end (not included).

    An inactive row sees none, whatever its position says.
    """
    end = jnp.where(active != 0, position, 0)
    first = jnp.zeros_like(end) if window is None else jnp.maximum(end - (window - 1), 0)
    return first, end


def find_span(first: jax.Array, end: jax.Array, splits: int, split: jax.Array) -> Span:
    """The part of one split of the slots that are seen, int32 of one shape.

    All parts but the last have one size, a multiple of 16 slots, and no slot is in two of them.
    The first split also has the new token, so it works even if no slot is seen.
    """
    each = _divide_up(_divide_up(end - first, splits), _GRANULE) * _GRANULE
    start = first + split * each
    return Span(start, jnp.minimum(start + each, end), (split == 0) | (start < end))


def count_blocks(span: Span, block: int) -> jax.Array:
    """How many blocks of slots cover a span."""
    return _divide_up(jnp.maximum(span.end - span.first, 0), block)


def pad(size: int) -> int:
    """The next power of two, which Triton wants of every axis."""
    return 1 << (size - 1).bit_length()


def _round_down(size: int) -> int:
    return 1 << (size.bit_length() - 1)


def _divide_up(number: jax.Array, by: int) -> jax.Array:
    return lax.div(number + (by - 1), jnp.full_like(number, by))
