"""Which modules of the files are several modules of the definition."""

from __future__ import annotations

from jaxwna16.models.config.fused import Fused
from jaxwna16.models.qwen3_5.config import KINDS, Qwen35Config


def list_fused(config: Qwen35Config) -> tuple[Fused, ...]:
    """Of Qwen3-Next, the projections of delta nets: key head by key head, what belongs to each."""
    if not KINDS[config.model_type].interleaves_heads:
        return ()
    delta = config.delta
    values = delta.value_heads // delta.key_heads
    keys, wide = delta.key_dim, values * delta.value_dim
    qkvz = (
        ("in_proj_qkv", keys),
        ("in_proj_qkv", keys),
        ("in_proj_qkv", wide),
        ("in_proj_z", wide),
    )
    ba = (("in_proj_b", values), ("in_proj_a", values))
    return tuple(
        Fused(name=f"linear_attn.{name}", segments=segments, blocks=delta.key_heads)
        for name, segments in (("in_proj_qkvz", qkvz), ("in_proj_ba", ba))
    )
