"""One token of the gated delta rule in one kernel, from the products before it to the one after.

    qkv, z, b, a -> causal convolution, silu -> lengths of q and k -> decay, state, output -> norm

As XLA fusions it would be about ten kernels, and the state, which is most of the bytes, would be
read twice. Here a program has one value head of a row: it reads the head's state once, keeps it in
registers and writes it back. It asks for the state first, so that all else happens while that is on
its way.

Value heads that share a key head convolve its q and k once more each, which costs less than another
kernel. So the inputs of the convolution are not updated in place: programs would read what others
have written. The first of these heads writes those of q and k.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton.parts import Parts, load_sum
from pallas_kernels.triton.walk import divide

_MOST_HELD = 1 << 13
"""Numbers of a state that are worked on at a time, while as many are on their way: 32 of each for
each thread of 8 warps, so that two programs fit on a core and nothing is spilled."""
_EPS = 1e-6


def step_delta_rule(
    qkv: Parts,
    z: Parts,
    b: Parts,
    a: Parts,
    *,
    conv_weight: jax.Array,
    inputs: jax.Array,
    state: jax.Array,
    A_log: jax.Array,
    dt_bias: jax.Array,
    norm_weight: jax.Array,
    norm_eps: float,
    active: jax.Array,
    key_heads: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Step every row by one token.

    Args:
      qkv: [B, C], queries of all key heads, keys of all key heads, values of all value heads.
      z: [B, Hv * Dv], gates of the result.
      b, a: [B, Hv]; sigmoid(b) is how much is written, and a is of the decay
        exp(-exp(A_log) softplus(a + dt_bias)).
      conv_weight: [C, W]; conv_weight[:, W - 1] multiplies the newest input.
      inputs: [B, W - 1, C], the inputs of the convolution before this token, the newest last. The
        products are rounded to its dtype, and so is what a model of that dtype rounds.
      state: float32 [B, Hv, Dk, Dv], updated in place.
      A_log, dt_bias: float32 [Hv].
      norm_weight: [Dv].
      active: int32 [B]; where it is 0, inputs and state stay, and y is 0.
      key_heads: Hv / key_heads value heads share a key head.

    Returns:
      y [B, Hv * Dv] in the dtype of `inputs`, and the new inputs and state.
    """
    batch, heads, key_dim, value_dim = state.shape
    kept = {
        "conv_weight": conv_weight,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "norm_weight": norm_weight,
        "active": active,
    }
    operands = (qkv, z, b, a, kept, inputs, state)
    held = pl.next_power_of_2(key_dim) * pl.next_power_of_2(value_dim)
    return pl.pallas_call(
        functools.partial(_step_head, key_heads=key_heads, eps=norm_eps),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads * value_dim), inputs.dtype),
            jax.ShapeDtypeStruct(inputs.shape, inputs.dtype),
            jax.ShapeDtypeStruct(state.shape, state.dtype),
        ],
        grid=(batch * heads,),
        input_output_aliases={len(jax.tree.leaves(operands)) - 1: 2},
        compiler_params=plgpu.CompilerParams(num_warps=8 if held > _MOST_HELD else 4, num_stages=1),
        interpret=interpret,
        name="step_delta_rule",
    )(*operands)


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """The causal convolution of one row; its fields but `row` and `is_active` are references."""

    qkv: Any
    weight: Any
    inputs: Any
    new_inputs: Any
    row: jax.Array
    is_active: jax.Array

    def run(self, features: jax.Array, exists: jax.Array, is_mine: Any = True) -> jax.Array:
        """silu of the convolution of these features, float32, 0 where none exists.

        Sum and silu are rounded to the dtype of the inputs. Writes the new inputs if `is_mine`.
        """
        load = functools.partial(plgpu.load, mask=exists, other=0)
        before, dtype = self.inputs.shape[1], self.inputs.dtype
        line = [load(self.inputs.at[self.row, i, features]) for i in range(before)]
        line.append(load_sum(self.qkv, self.row, features, exists).astype(dtype))
        taps = [load(self.weight.at[features, i]).astype(jnp.float32) for i in range(before + 1)]
        total = line[0].astype(jnp.float32) * taps[0]
        for x, tap in zip(line[1:], taps[1:], strict=True):
            total = total + x.astype(jnp.float32) * tap
        for i, (old, new) in enumerate(itertools.pairwise(line)):
            plgpu.store(
                self.new_inputs.at[self.row, i, features],
                jnp.where(self.is_active, new, old),
                mask=exists & is_mine,
            )
        mixed = total.astype(dtype).astype(jnp.float32)
        return (mixed * jax.nn.sigmoid(mixed)).astype(dtype).astype(jnp.float32)


def _step_head(
    qkv, z, b, a, kept, inputs, state, y_ref, new_inputs, new_state, *, key_heads: int, eps: float
) -> None:
    """Step one value head of one row."""
    _, heads, key_dim, value_dim = state.shape
    row, head = divide(pl.program_id(0), heads)
    key_head, place = divide(head, heads // key_heads)
    is_active = plgpu.load(kept["active"].at[row]) > 0
    keys = jnp.arange(pl.next_power_of_2(key_dim), dtype=jnp.int32)
    width = pl.next_power_of_2(value_dim)
    block = min(width, _MOST_HELD // keys.size)
    blocks = [first + jnp.arange(block, dtype=jnp.int32) for first in range(0, width, block)]

    def find(ref: Any, values: jax.Array) -> tuple[Any, jax.Array]:
        """The state at all keys and these values, and which of it is there and to be touched."""
        exists = (keys < key_dim)[:, None] & (values < value_dim)[None, :] & is_active
        return ref.at[row, head, keys[:, None], values[None, :]], exists

    def load(values: jax.Array) -> jax.Array:
        place, mask = find(state, values)
        return plgpu.load(place, mask=mask, other=0.0)

    coming = load(blocks[0])
    convolution = _Convolution(qkv, kept["conv_weight"], inputs, new_inputs, row, is_active)
    q, k = _find_directions(convolution, keys, key_head, key_heads, key_dim, place == 0)
    dtype = inputs.dtype
    beta, decay = _load_factors(b, a, kept, row, head, dtype)
    mixed = []
    for i, values in enumerate(blocks):
        # the next block is on its way while this one is worked on
        held, coming = coming, load(blocks[i + 1]) if i + 1 < len(blocks) else coming
        features = 2 * key_heads * key_dim + head * value_dim + values
        v = convolution.run(features, values < value_dim)
        held = held * decay[:, None]
        delta = (v - jnp.sum(k[:, None] * held, axis=0)) * beta
        held = held + k[:, None] * delta[None, :]
        target, mask = find(new_state, values)
        plgpu.store(target, held, mask=mask)
        mixed.append(_round(jnp.sum(q[:, None] * held, axis=0), dtype))
    mean = sum(jnp.sum(x * x) for x in mixed) / value_dim
    for values, x in zip(blocks, mixed, strict=True):
        exists, features = values < value_dim, head * value_dim + values
        weight = plgpu.load(kept["norm_weight"].at[values], mask=exists, other=0)
        gate = _round(load_sum(z, row, features, exists), dtype)
        x = _round(x * lax.rsqrt(mean + eps), dtype)
        y = _round(x * weight.astype(jnp.float32), dtype) * (gate * jax.nn.sigmoid(gate))
        y = jnp.where(is_active, y, 0.0).astype(dtype)
        plgpu.store(y_ref.at[row, features], y, mask=exists)


def _find_directions(
    convolution: _Convolution,
    keys: jax.Array,
    key_head: jax.Array,
    key_heads: int,
    key_dim: int,
    is_mine: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """q / sqrt(Dk) and k of a key head, both divided by their lengths; float32 [Dk].

    One tile holds both. It has a number for each thread: Triton would take less for cheap, and
    compute it again for each number of the state that a thread holds.
    """
    which = jnp.arange(2, dtype=jnp.int32)[:, None]
    features = (which * key_heads + key_head) * key_dim + keys[None, :]
    exists = (which >= 0) & (keys < key_dim)[None, :]
    both = convolution.run(features, exists, is_mine)
    both = both * lax.rsqrt(jnp.sum(both * both, axis=1) + _EPS)[:, None]
    q, k = (jnp.sum(jnp.where(which == i, both, 0.0), axis=0) for i in range(2))
    return q * key_dim**-0.5, k


def _load_factors(
    b: Any, a: Any, kept: Any, row: jax.Array, head: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """How much of the value is written, and how much of the state stays; float32 [1]."""
    own = jnp.full(1, head, jnp.int32)
    beta, a = (_round(load_sum(parts, row, own), dtype) for parts in (b, a))
    rate, bias = (plgpu.load(kept[name].at[own]) for name in ("A_log", "dt_bias"))
    decay = jnp.exp(-jnp.exp(rate) * jax.nn.softplus(a + bias))
    return _round(jax.nn.sigmoid(beta), dtype), decay


def _round(x: jax.Array, dtype: Any) -> jax.Array:
    """To a narrower dtype, and float32 again."""
    return x.astype(dtype).astype(jnp.float32)
