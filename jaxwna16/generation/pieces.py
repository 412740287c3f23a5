"""How many tokens of each prompt are run at once.

More tokens make products that use a device better, up to a number that depends on the device. But
what a layer computes of a piece must fit into memory. So a piece is as long as pays off, or shorter
where memory is scarce.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxwna16.generation.decoding import round_up
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.config.language_config import LanguageConfig
from jaxwna16.programs import list_devices
from pallas_kernels.backends import TRITON_DTYPES

SHORTEST = 16
"""Tokens of a row that are run at once in any case."""
LONGEST = {"gpu": 2048, "cpu": 512}
"""Tokens of a row beyond which a piece gains little, by platform; others are as a CPU. A GPU
expands packed weights for 1024 tokens and more; the longer the piece, the less that costs."""
MOST_TOKENS = 8192
"""The same of all rows together."""
SHARE = 0.5
"""Of the free memory of a device, what a piece may take."""
UNTOLD = 2 << 30
"""Bytes that it may take where a device does not tell what is free, as CPUs do not."""


@dataclasses.dataclass(frozen=True)
class Room:
    """Where a piece runs.

    Attributes:
      platform: "cpu", "gpu" or another of JAX's.
      free: bytes that may be allocated, or None if the device does not tell.
    """

    platform: str
    free: int | None = None


def choose_piece(
    model: CausalLM, longest: int, batch: int, slots: int, asked: int | None = None
) -> int:
    """Tokens of each row in a piece; by default all pieces are about equally long.

    Args:
      model: with weights where it will run.
      longest: tokens of the longest prompt.
      batch: rows.
      slots: of the cache, which is not yet allocated.
      asked: what the user wants, or None.
    """
    if model.config.whole_prompts:
        return round_up(longest)
    if asked is not None:
        return min(asked, round_up(longest))
    limit = limit_piece(model, batch, slots, _find_room(model))
    pieces = -(-longest // limit)
    return min(round_up(-(-longest // pieces)), round_up(longest))


def limit_piece(model: CausalLM, batch: int, slots: int, room: Room) -> int:
    """The most tokens of a row that are run at once: a power of two, so that programs are few."""
    longest = LONGEST.get(room.platform, LONGEST["cpu"])
    budget = UNTOLD
    if room.free is not None:
        budget = int(SHARE * max(0, room.free - _measure_cache(model, batch, slots)))
    has_kernel = room.platform == "gpu" and model.dtype in TRITON_DTYPES and model.backend != "xla"
    each = measure_token(model.config, model.dtype, 0 if has_kernel else slots)
    tokens = min(MOST_TOKENS, budget // each)
    most = max(SHORTEST, min(longest, tokens // batch))
    return 1 << (most.bit_length() - 1)


def measure_token(config: LanguageConfig, dtype: jnp.dtype, slots: int) -> int:
    """Bytes that a layer takes for one token of a piece, beside its weights.

    That is the stream before and after, normalised and added to, and the widest products. Without a
    kernel for attention, it is also the token's scores for all heads and `slots`, float32, before
    and after the softmax.
    """
    features = 4 * config.hidden_size + config.widest_features
    return features * dtype.itemsize + 2 * 4 * config.num_attention_heads * slots


def _find_room(model: CausalLM) -> Room:
    """That of the device with the least free memory, of those that hold the model."""
    devices = list_devices(model)
    free = [_read_free(device) for device in devices]
    told = [bytes_free for bytes_free in free if bytes_free is not None]
    platform = next(iter(devices)).platform
    return Room(platform, min(told) if told else None)


def _read_free(device: Any) -> int | None:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats or "bytes_in_use" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


def _measure_cache(model: CausalLM, batch: int, slots: int) -> int:
    cache = jax.eval_shape(lambda: model.make_cache(batch, slots))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
