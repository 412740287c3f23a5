"""Rotary position embeddings and their scalings.

The formulas are those of transformers' `modeling_rope_utils.py` (default, linear, proportional,
dynamic NTK, llama3, yarn, longrope), computed in the same order and in float32, so that angles
agree to the last bits:

    default  f_i = theta^(-2i/d),  i = 0 .. d/2 - 1,  d = rotated features
    linear   f_i / factor
    proportional  f_i / factor of the first pairs, 0 of the others
    dynamic  theta' = theta * (factor * L / P - (factor - 1))^(d / (d - 2)),  L = max(tokens, P)
    llama3   f_i, f_i / factor, or a blend of the two, by wavelength (Llama 3.1)
    yarn     a blend of f_i and f_i / factor by rotations over the original length; cos and sin are
             multiplied by an attention factor (https://arxiv.org/abs/2309.00071)
    longrope f_i / s_i in rows of up to P tokens, f_i / l_i in longer ones; cos and sin of both are
             multiplied by sqrt(1 + ln(factor) / ln(P)) (https://arxiv.org/abs/2402.13753)

Ministral 3 also multiplies rotated queries by 1 + beta ln(1 + floor(position / P)), P the original
length, as Llama 4 does in layers without rope.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxwna16.models.config.rope_config import RopeConfig
from pallas_kernels.formulas.rotation import Rotation


def make_rotation(
    rope: RopeConfig,
    head_dim: int,
    positions: jax.Array,
    dtype: jax.typing.DTypeLike,
    table_dtype: jax.typing.DTypeLike | None = None,
    lengths: jax.Array | None = None,
) -> Rotation:
    """`rotation_tables` and `query_scales` of the positions.

    Args:
      dtype: of the queries.
      table_dtype: of cosines and sines; None is the same.
      lengths: as in `rotation_tables`.
    """
    tables = rotation_tables(rope, head_dim, positions, table_dtype or dtype, lengths)
    return Rotation(*tables, query_scales(rope, positions, dtype))


def rotation_tables(
    rope: RopeConfig,
    head_dim: int,
    positions: jax.Array,
    dtype: jax.typing.DTypeLike,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every position's angles.

    "dynamic" takes the length L of a row from that row's largest position, so that rows do not
    depend on their neighbours (transformers takes the batch's largest).

    Args:
      head_dim: d above, as in all functions here: how many features of a head are rotated.
      positions: int32 [B, S].
      lengths: int32 [B], tokens of each row, for "longrope"; None is up to the largest position.

    Returns:
      cos, sin in `dtype`, each [B, S, head_dim / 2]: the second half of them repeats the first.
    """
    if rope.rope_type == "dynamic":
        lengths = jnp.max(positions, axis=1) + 1
        frequencies = _dynamic_frequencies(rope, head_dim, lengths)[:, None, :]
    elif rope.rope_type == "longrope":
        lengths = jnp.max(positions, axis=1) + 1 if lengths is None else lengths
        short, long = (jnp.asarray(_divide(rope, head_dim, is_long)) for is_long in (False, True))
        is_long = lengths > rope.original_max_positions
        frequencies = jnp.where(is_long[:, None, None], long[None, None], short[None, None])
    else:
        frequencies = jnp.asarray(inverse_frequencies(rope, head_dim))[None, None, :]
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    factor = attention_factor(rope)
    return (jnp.cos(angles) * factor).astype(dtype), (jnp.sin(angles) * factor).astype(dtype)


def query_scales(
    rope: RopeConfig, positions: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array | None:
    """What rotated queries are multiplied by, in `dtype` [B, S]; None where they are not."""
    if not rope.query_beta:
        return None
    lengths = jnp.floor(positions.astype(jnp.float32) / rope.original_max_positions)
    return (1 + rope.query_beta * jnp.log(1 + lengths)).astype(dtype)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """The f_i of the module's docstring, float32 [d / 2]; those up to length P."""
    wavelengths = _power(rope.theta, head_dim)
    plain = np.float32(1) / wavelengths
    if rope.rope_type == "linear":
        return plain / np.float32(rope.factor)
    if rope.rope_type == "proportional":
        turning = int(rope.proportion * head_dim // 2)
        return np.where(np.arange(head_dim // 2) < turning, plain, 0) / np.float32(rope.factor)
    if rope.rope_type == "llama3":
        return _blend_llama3(rope, plain)
    if rope.rope_type == "yarn":
        stretched = np.float32(1) / (np.float32(rope.factor) * wavelengths)
        keep = np.float32(1) - _yarn_ramp(rope, head_dim)
        return stretched * (np.float32(1) - keep) + plain * keep
    if rope.rope_type == "longrope":
        return _divide(rope, head_dim, is_long=False)
    return plain


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1 except for yarn and longrope."""
    if rope.rope_type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.rope_type == "longrope":
        ratio = math.log(max(rope.factor, 1.0)) / math.log(rope.original_max_positions)
        return math.sqrt(1 + ratio)
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_scale(rope.factor, rope.mscale) / _yarn_scale(rope.factor, rope.mscale_all_dim)
    return _yarn_scale(rope.factor, 1.0)


def _power(theta: float, head_dim: int) -> np.ndarray:
    """theta^(2i/d): exponents in float32, the power rounded once to float32 (as torch does)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(float(theta), exponents.astype(np.float64)).astype(np.float32)


def _divide(rope: RopeConfig, head_dim: int, is_long: bool) -> np.ndarray:
    """Frequencies of longrope, float32 [head_dim / 2]."""
    factors = np.array(rope.long_factors if is_long else rope.short_factors, np.float32)
    return np.float32(1) / (factors * _power(rope.theta, head_dim))


def _dynamic_frequencies(rope: RopeConfig, head_dim: int, lengths: jax.Array) -> jax.Array:
    """Frequencies float32 [B, head_dim / 2] for rows of the given lengths, int32 [B]."""
    limit = rope.original_max_positions
    stretch = rope.factor * jnp.maximum(lengths, limit).astype(jnp.float32) / limit
    bases = rope.theta * (stretch - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    scaled = 1 / bases[:, None] ** exponents[None, :]
    within = jnp.asarray(inverse_frequencies(rope, head_dim))[None, :]
    return jnp.where((lengths > limit)[:, None], scaled, within)


def _blend_llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    length, factor = np.float32(rope.original_max_positions), np.float32(rope.factor)
    low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
    wavelengths = np.float32(2 * math.pi) / plain
    scaled = np.where(wavelengths > length / low, plain / factor, plain)
    smooth = (length / wavelengths - low) / (high - low)
    blended = (np.float32(1) - smooth) * scaled / factor + smooth * scaled
    between = (wavelengths >= length / high) & (wavelengths <= length / low)
    return np.where(between, blended, scaled)


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """From 0 (more than beta_fast turns in the original length) to 1 (fewer than beta_slow)."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as in the reference: no division by zero
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(ramp, np.float32(0), np.float32(1))


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
