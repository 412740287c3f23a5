"""Reading the rope parameters of a `config.json`."""

from __future__ import annotations

from collections.abc import Mapping

from jaxwna16.models.config_reader import ConfigReader, is_positive
from jaxwna16.models.rope import ROPE_TYPES, RopeConfig


def read_rotary_dim(reader: ConfigReader, head_dim: int, default: float) -> int:
    """How many features of a head are rotated: head_dim times `partial_rotary_factor`.

    Args:
      default: the factor of the family; one that rotates whole heads knows no other.
    """
    factor = reader.config.get("partial_rotary_factor", default)
    values = reader.config.get("rope_parameters") or reader.config.get("rope_scaling")
    if isinstance(values, Mapping) and values.get("partial_rotary_factor") is not None:
        factor = values["partial_rotary_factor"]
    if default == 1.0:
        if factor != 1.0:
            reader.refuse("partial_rotary_factor", factor, "1.0")
        return head_dim
    rotated = int(head_dim * factor) if is_positive(factor) else 0
    if 2 <= rotated <= head_dim and rotated % 2 == 0:
        return rotated
    reader.refuse("partial_rotary_factor", factor, f"an even part of head_dim = {head_dim}")
    return head_dim


def read_rope(reader: ConfigReader, max_positions: int, theta: float) -> RopeConfig:
    """Rope parameters: `rope_parameters`, or `rope_theta` beside `rope_scaling` with `type`.

    Args:
      theta: `rope_theta` of the family where it is absent.
    """
    config = reader.config
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    where = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
        reader.refuse(where, given, "one flat set of parameters for all layers")
        return RopeConfig(rope_type="default", theta=1e4, original_max_positions=max_positions)
    values = {key: value for key, value in given.items() if value is not None}
    rope_type = values.get("rope_type", values.get("type", "default"))
    theta = values.get("rope_theta", config.get("rope_theta", theta))
    original = max_positions
    if rope_type in ("llama3", "yarn"):
        original = values.get("original_max_position_embeddings", original)
        original = config.get("original_max_position_embeddings", original)
    if rope_type not in ROPE_TYPES:
        reader.refuse(f"{where}.rope_type", rope_type, f"one of {', '.join(ROPE_TYPES)}")
        rope_type = "default"
    if rope_type == "yarn" and is_positive(original):
        values.setdefault("factor", max_positions / original)
    needed = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
    numbers = {"rope_theta": theta, "original_max_position_embeddings": original}
    numbers |= {key: values.get(key) for key in needed.get(rope_type, ())}
    optional = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    numbers |= {key: values[key] for key in optional if key in values}
    for key, value in numbers.items():
        if not is_positive(value):
            reader.refuse(f"{where}.{key}", value, "a positive number")
    return RopeConfig(
        rope_type=rope_type,
        theta=theta,
        original_max_positions=original,
        truncate=values.get("truncate", True),
        **{key: values[key] for key in (*optional, *needed.get(rope_type, ())) if key in values},
    )
