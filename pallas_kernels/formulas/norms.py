"""Norms, and the residual stream that a product is added to.

    x' = residual + factor late(y)    y the product, rounded to the stream's dtype
    h  = early(x')                    what the next product takes

Most models have `early` norms alone; OLMo 2 has `late` ones alone, others have both. Granite has a
factor that is not 1.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

ROOT_KINDS = ("rounded", "offset", "wide")
"""They divide by a root mean square."""
KINDS = (*ROOT_KINDS, "centered")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["eps", "kind"]
)
@dataclasses.dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x^2) + eps) times a weight, in one of three ways of rounding; or centered.

    Attributes:
      weight: [N].
      eps: of the formula.
      kind: "rounded": normalised in float32, rounded, then times the weight in the dtype of x
        (Llama); "offset": times 1 + weight in float32, rounded once (Qwen3.5); "wide": times the
        weight in float32, rounded once (OLMo 2); "centered": the same of x - mean(x), a layer norm
        without bias (Cohere).
    """

    weight: jax.Array
    eps: float
    kind: str


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["residual", "late", "early", "ahead"],
    meta_fields=["factor"],
)
@dataclasses.dataclass(frozen=True)
class Onto:
    """Where a product goes; see the module's docstring.

    Attributes:
      residual: [..., N].
      late: norm of the product, or None.
      early: norm of the sum, or None.
      ahead: packed words that the next product takes. They change no result; see
        `pallas_kernels.tiles.ahead`.
      factor: of what is added, which is rounded once more behind it.
    """

    residual: jax.Array
    late: Norm | None = None
    early: Norm | None = None
    ahead: tuple[jax.Array, ...] = ()
    factor: float = 1.0


def normalise(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, float32."""
    wide = x.astype(jnp.float32)
    return wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


def apply_norm(x: jax.Array, norm: Norm) -> jax.Array:
    """The norm of x [..., N] over its last axis, in the dtype of x."""
    wide = x.astype(jnp.float32)
    if norm.kind == "centered":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return apply_weight(normalise(wide, norm.eps), norm.weight, norm.kind, x.dtype)


def apply_weight(normalised: jax.Array, weight: jax.Array, kind: str, dtype) -> jax.Array:
    """The second half of the formula: float32 [..., N] times the weight [N], in `dtype`."""
    weight = jnp.expand_dims(weight, range(normalised.ndim - 1))
    if kind == "rounded":
        return normalised.astype(dtype) * weight
    factor = weight.astype(jnp.float32)
    return (normalised * (1 + factor if kind == "offset" else factor)).astype(dtype)


def apply_factor(x: jax.Array, factor: float) -> jax.Array:
    """x times a number that is not rounded before: computed in float32, in the dtype of x."""
    if factor == 1:
        return x
    # times a Python number, the number would be rounded to the dtype of x first
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def add_norm(y: jax.Array, onto: Onto) -> tuple[jax.Array, jax.Array | None]:
    """Add y [..., N] to the stream: x' and h (None without `early`)."""
    y = y if onto.late is None else apply_norm(y, onto.late)
    x = onto.residual + apply_factor(y, onto.factor)
    return x, None if onto.early is None else apply_norm(x, onto.early)
