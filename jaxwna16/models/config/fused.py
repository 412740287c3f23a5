"""`Fused`: a module of the files that is several modules of the model, told by its rows.

Files of some families have one projection where a definition has several, since what takes the same
input can be one product. A row is an output feature, so that nothing but their order differs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxwna16.models.config.language_config import LanguageConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused:
    """What the rows of a module of the files are.

    They lie in blocks, each of which has the same segments: (("q", 2), ("k", 1)) in two blocks is
    the order q0 q1 k0 q2 q3 k1. A part of the model has its rows segment by segment, and of each
    segment those of all blocks: a part that is named twice has first the one, then the other.

    Attributes:
      name: the end of its path in the files, "qkv_proj" or "mlp.gate_up_proj".
      segments: of one block in their order: the module of the model that stands in its place, and
        how many rows it has there.
      blocks: how many there are.
    """

    name: str
    segments: tuple[tuple[str, int], ...]
    blocks: int = 1

    @property
    def rows(self) -> int:
        """N of the module of the files."""
        return self.blocks * sum(size for _, size in self.segments)

    @functools.cached_property
    def parts(self) -> dict[str, np.ndarray]:
        """The modules of the model, by the last part of their paths -> their rows, int32 [N]."""
        first, found = 0, {}
        blocks = np.arange(self.rows, dtype=np.int32).reshape(self.blocks, -1)
        for part, size in self.segments:
            found.setdefault(part, []).append(blocks[:, first : first + size].reshape(-1))
            first += size
        return {part: np.concatenate(segments) for part, segments in found.items()}


ListFused = Callable[[Any], tuple[Fused, ...]]
"""Which modules of a family's files are such, of its configuration."""


def fuse_nothing(config: LanguageConfig) -> tuple[Fused, ...]:
    """Every module of the files is one of the model."""
    del config
    return ()


def fuse_heads(config: LanguageConfig) -> Fused:
    """`qkv_proj`: all queries, then all keys, then all values."""
    queries, keys = (
        heads * config.head_dim
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    segments = (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))
    return Fused(name="self_attn.qkv_proj", segments=segments)


def fuse_gate_and_up(config: LanguageConfig) -> Fused:
    """`gate_up_proj` of an MLP that is not experts'."""
    inner = config.intermediate_size
    return Fused(name="mlp.gate_up_proj", segments=(("gate_proj", inner), ("up_proj", inner)))
