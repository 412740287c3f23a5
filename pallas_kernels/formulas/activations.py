"""The activations of experts and of gated products, on float32.

silu         h sigmoid(h)                                        times up, if gated
gelu         h Phi(h), Phi the normal distribution function      times up, if gated
gelu_tanh    h (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3))) / 2   times up, if gated
relu2        max(h, 0)^2                                         times up, if gated
swigluoai    g sigmoid(1.702 g) (u + 1), g = min(gate, 7), u = up clipped to [-7, 7]
             (gpt-oss, https://github.com/openai/gpt-oss, `swiglu`)
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.errors import SpecError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swigluoai")
IN_KERNEL = ("silu", "gelu_tanh", "relu2", "swigluoai")
"""Those that Pallas can lower for a GPU, where it has no error function."""

_ALPHA, _LIMIT = 1.702, 7.0


def check(name: str, gated: bool) -> None:
    """Raise a SpecError unless a layer, gated or not, can use the activation `name`."""
    if name not in ACTIVATIONS:
        raise SpecError(f"activation must be one of {ACTIVATIONS}, got {name!r}")
    if name == "swigluoai" and not gated:
        raise SpecError("activation 'swigluoai' is for gated experts")


def activate(h: jax.Array, activation: str, *, gated: bool, interleaved: bool) -> jax.Array:
    """Apply an activation to float32 [..., 2I] (gated) or [..., I]; float32 [..., I]."""
    if not gated:
        return apply(activation, h)
    if interleaved:
        return apply(activation, h[..., ::2], h[..., 1::2])
    gate, up = jnp.split(h, 2, axis=-1)
    return apply(activation, gate, up)


def apply(name: str, gate: jax.Array, up: jax.Array | None = None) -> jax.Array:
    """act(gate) * up, or act(gate) without up; float32 in, float32 out."""
    if name == "swigluoai":
        assert up is not None
        gate, up = _cut_above(gate, _LIMIT), _cut_below(_cut_above(up, _LIMIT), -_LIMIT)
        return gate * jax.nn.sigmoid(_ALPHA * gate) * (up + 1)
    y = _apply_alone(name, gate)
    return y if up is None else y * up


def _apply_alone(name: str, h: jax.Array) -> jax.Array:
    if name == "silu":
        return h * jax.nn.sigmoid(h)
    if name == "gelu":
        return h * 0.5 * (1 + jax.lax.erf(h * math.sqrt(0.5)))
    if name == "gelu_tanh":
        return h * 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h * h * h)))
    positive = _cut_below(h, 0.0)
    return positive * positive


# not minimum and maximum: Pallas-Triton lowers them to instructions that drop a NaN (minnumf)
def _cut_above(h: jax.Array, limit: float) -> jax.Array:
    return jnp.where(h > limit, limit, h)


def _cut_below(h: jax.Array, limit: float) -> jax.Array:
    return jnp.where(h < limit, limit, h)


def cap(x: jax.Array, limit: float | None) -> jax.Array:
    """limit tanh(x / limit), which is near x where x is small; x itself without a limit."""
    return x if limit is None else limit * jnp.tanh(x / limit)


def weigh(x: jax.Array, gate: jax.Array) -> jax.Array:
    """x [..., N] times the sigmoid of the logits `gate` [..., 1], float32."""
    return x.astype(jnp.float32) * jax.nn.sigmoid(gate.astype(jnp.float32))


def round_sigmoid(x: jax.Array) -> jax.Array:
    """The sigmoid of a gate, computed in float32 and rounded to the dtype of x."""
    return jax.nn.sigmoid(x.astype(jnp.float32)).astype(x.dtype)
