"""The gated delta rule and its short convolution, as pure functions that continue where a state is.

Per value head, with a state S [Dk, Dv] and decays alpha = exp(g) of at most 1
(https://arxiv.org/abs/2412.06464):

    d_t = beta_t (v_t - alpha_t S_{t-1}^T k_t)
    S_t = alpha_t S_{t-1} + k_t d_t^T
    o_t = S_t^T q_t

One token is that recurrence. A piece of tokens goes in chunks of C: with c_i = g_1 + ... + g_i
within a chunk and the state S before it, the d_i of a chunk solve a triangular system,

    (I + L) D = beta (V - exp(c) K S),   L_ij = beta_i exp(c_i - c_j) k_i.k_j   for j < i
    O = exp(c) Q S + tril(exp(c_i - c_j) q_i.k_j) D
    S' = exp(c_C) S + sum_i exp(c_C - c_i) k_i d_i^T

so that the state is touched once in C tokens. All of it is float32. Tokens from `count` on are
padding: they leave states as they are, whatever they hold, and their outputs mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formulas.activations import round_sigmoid
from pallas_kernels.formulas.delta_net import DeltaCache, DeltaNet
from pallas_kernels.formulas.norms import normalise

Array = jax.Array

CHUNK = 64
"""Tokens that are one triangular system."""
_EPS = 1e-6


def mix(
    products: Sequence[Array], net: DeltaNet, cache: DeltaCache, count: Array
) -> tuple[Array, DeltaCache]:
    """From qkv, z, b and a [B, S, N] to the normalised and gated result [B, S, Hv * Dv].

    Also the cache with the first `count` tokens of each row, int32 [B].
    """
    qkv, z, b, a = products
    qkv, inputs = convolve(qkv, net.conv_weight, cache.inputs, count)
    keys = net.key_heads * net.key_dim
    q, k, v = (
        part.reshape(*qkv.shape[:2], -1, size)
        for part, size in zip(
            jnp.split(qkv, [keys, 2 * keys], axis=-1),
            (net.key_dim, net.key_dim, net.value_dim),
            strict=True,
        )
    )
    beta = round_sigmoid(b)
    rate, bias = (p[None, None, :] for p in (net.A_log, net.dt_bias))
    g = -jnp.exp(rate) * jax.nn.softplus(a.astype(jnp.float32) + bias)
    mixed, state = run_delta_rule(q, k, v, g, beta, cache.state, count)
    y = gate_norm(mixed, z.reshape(mixed.shape), net.norm_weight, net.norm_eps)
    return y.reshape(*qkv.shape[:2], -1), DeltaCache(inputs, state)


def gate_norm(x: Array, gate: Array, weight: Array, eps: float) -> Array:
    """The norm of x in the gate's dtype, times silu(gate) in float32; in the gate's dtype."""
    normalised = normalise(x.astype(gate.dtype), eps).astype(gate.dtype)
    scaled = (normalised * jnp.expand_dims(weight, range(x.ndim - 1))).astype(jnp.float32)
    return (scaled * jax.nn.silu(gate.astype(jnp.float32))).astype(gate.dtype)


def mark_tokens(count: Array, steps: int) -> Array:
    """Which of `steps` tokens are no padding, bool [B, S]; count is int32 [B]."""
    return jnp.arange(steps)[None, :] < count[:, None]


def convolve(x: Array, weight: Array, inputs: Array, count: Array) -> tuple[Array, Array]:
    """silu of the causal convolution of each feature by itself.

    Args:
      x: [B, S, C], new inputs.
      weight: [C, W]; weight[:, W - 1] multiplies the newest input.
      inputs: [B, W - 1, C], the inputs before, zeros at the start of a row.
      count: int32 [B].

    Returns:
      [B, S, C] in the dtype of x, to which the sum and its silu, each float32, are rounded; and the
      last W - 1 inputs up to `count`.
    """
    steps, width = x.shape[1], weight.shape[1]
    line = jnp.concatenate([inputs, x], axis=1)
    taps = weight.astype(jnp.float32)[None, None]
    # a sum of W products, in the order of a loop over the inputs
    summed = sum(line[:, i : i + steps].astype(jnp.float32) * taps[..., i] for i in range(width))
    last = count[:, None, None] + jnp.arange(width - 1)[None, :, None]
    mixed = jnp.asarray(summed).astype(x.dtype).astype(jnp.float32)
    return jax.nn.silu(mixed).astype(x.dtype), jnp.take_along_axis(line, last, axis=1)


def run_delta_rule(
    q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, count: Array
) -> tuple[Array, Array]:
    """The gated delta rule over a piece of each row: one token by recurrence, more in chunks.

    q and k are divided by their lengths, and q by sqrt(Dk). Value head h reads key head
    h // (value heads / key heads).

    Args:
      q, k: [B, S, key heads, Dk].
      v: [B, S, value heads, Dv].
      g: [B, S, value heads], logarithms of decays, at most 0.
      beta: [B, S, value heads], how much of each d_t is written.
      state: float32 [B, value heads, Dk, Dv].
      count: int32 [B].

    Returns:
      [B, S, value heads, Dv] in the dtype of v, and the state after `count` tokens.
    """
    valid = mark_tokens(count, q.shape[1])
    if q.shape[1] == 1:
        out, state = _step(*_widen(q, k, v, g, beta, valid), state)
        return out.swapaxes(1, 2).astype(v.dtype), state
    return _run_chunks((q, k, v, g, beta, valid), state)


def _widen(
    q: Array, k: Array, v: Array, g: Array, beta: Array, valid: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """As the formulas want them: float32, heads before tokens, keys for each value head.

    Padding, where bool `valid` [B, S] is False, is 0: no decay, and nothing is written.
    """

    def clear(x: Array) -> Array:
        mask = jnp.expand_dims(valid, range(2, x.ndim))
        return jnp.where(mask, x.astype(jnp.float32), 0.0).swapaxes(1, 2)

    repeats = v.shape[2] // k.shape[2]
    q = jnp.repeat(divide_by_length(clear(q)) * q.shape[-1] ** -0.5, repeats, axis=1)
    k = jnp.repeat(divide_by_length(clear(k)), repeats, axis=1)
    return q, k, clear(v), clear(g), clear(beta)


def divide_by_length(x: Array) -> Array:
    """x / sqrt(sum(x^2) + 1e-6) over the last axis."""
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPS)


def _step(q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array) -> tuple[Array, Array]:
    """One token of each row: q, k [B, H, 1, Dk], v [B, H, 1, Dv], g and beta [B, H, 1]."""
    state = state * jnp.exp(g)[..., None]
    delta = (v - _multiply(k, state)) * beta[..., None]
    state = state + k.swapaxes(2, 3) * delta
    return _multiply(q, state), state


def _run_chunks(inputs: tuple[Array, ...], state: Array) -> tuple[Array, Array]:
    """Pieces of any length, of which one chunk at a time is widened.

    A piece of 2048 tokens would otherwise be in memory in float32, its keys once for each value
    head: for 48 heads of 128 features, 150 MB instead of 42.

    Args:
      inputs: those of `_widen`, tokens before heads.
    """
    steps, dtype = inputs[0].shape[1], inputs[2].dtype
    size = min(CHUNK, steps)

    def cut(x: Array) -> Array:
        """[B, S, ...] as [chunks, B, size, ...], padded with zeros."""
        rest = ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, ((0, 0), (0, -steps % size), *rest))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    def run(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, g, beta, valid = chunk
        state, out = _run_chunk(state, _widen(q, k, v, g, beta, valid))
        return state, out.swapaxes(1, 2).astype(dtype)

    state, out = lax.scan(run, state, jax.tree.map(cut, inputs))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :steps], state


def _run_chunk(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
    """One triangular system: q, k [B, H, C, Dk], v [B, H, C, Dv], g and beta [B, H, C]."""
    q, k, v, g, beta = chunk
    size = q.shape[2]
    past = jnp.cumsum(g, axis=2)
    # exp of nothing above 0: the sums fall, and what lies ahead of a token is masked before exp
    seen = jnp.tril(jnp.ones((size, size), bool))[None, None]
    decay = jnp.exp(jnp.where(seen, past[..., :, None] - past[..., None, :], -jnp.inf))
    keys = k.swapaxes(2, 3)
    system = _multiply(k * beta[..., None], keys) * decay
    surprise = v - _multiply(k * jnp.exp(past)[..., None], state)
    # the diagonal and what is above it are not read
    delta = lax.linalg.triangular_solve(
        system, surprise * beta[..., None], left_side=True, lower=True, unit_diagonal=True
    )
    out = _multiply(q * jnp.exp(past)[..., None], state)
    out = out + _multiply(_multiply(q, keys) * decay, delta)
    left = jnp.exp(past[..., -1:] - past)[..., None]
    state = state * jnp.exp(past[..., -1])[..., None, None]
    return state + _multiply((k * left).swapaxes(2, 3), delta), out


def _multiply(a: Array, b: Array) -> Array:
    """Batched products of float32 matrices that no accelerator rounds."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
