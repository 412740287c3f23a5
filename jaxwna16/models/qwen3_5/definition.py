"""Qwen3-Next, Qwen3.5 and Qwen3.6 (`Qwen35Config`), dense or with experts: a hybrid model.

Most layers are gated delta nets, which keep a state of fixed size
(`pallas_kernels.xla.delta_rule`); every fourth is full attention, whose output passes a gate and
of whose heads a part is rotated.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwna16.layers.fused import gather, project_onto
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.parts.attention import SelfAttention
from jaxwna16.models.parts.decoder import Decoder
from jaxwna16.models.parts.decoder_layer import Layer
from jaxwna16.models.parts.layers import MLP, Linears, OffsetRMSNorm, list_words
from jaxwna16.models.parts.moe import SparseBlock
from jaxwna16.models.parts.piece import Piece, Stream
from jaxwna16.models.qwen3_5.config import Qwen35Config
from pallas_kernels.formulas.delta_net import DeltaCache, DeltaNet, make_delta_cache
from pallas_kernels.formulas.norms import Onto
from pallas_kernels.step.delta_rule import project_and_update
from pallas_kernels.xla.delta_rule import gate_norm

Array = jax.Array


class Convolution(nnx.Module):
    """The weight [C, 1, W] of a convolution of each feature by itself, as torch stores it."""

    def __init__(self, features: int, width: int, *, dtype):
        self.weight = nnx.Param(jnp.zeros((features, 1, width), dtype))


class GatedRMSNorm(nnx.Module):
    """`RMSNorm` of x in the gate's dtype, times silu(gate) in float32; in the gate's dtype."""

    def __init__(self, features: int, eps: float, *, dtype):
        self.weight = nnx.Param(jnp.ones(features, dtype))
        self.eps = eps

    def __call__(self, x: Array, gate: Array) -> Array:
        return gate_norm(x, gate, self.weight[...], self.eps)


class GatedDeltaNet(nnx.Module):
    """The gated delta rule over convolved queries, keys and values.

    Attributes:
      A_log, dt_bias: float32 [value heads], of the decay exp(-exp(A_log) softplus(a + dt_bias)).
        They are float32 in every model, since their exponentials cover a wide range.
    """

    def __init__(self, config: Qwen35Config, linears: Linears, path: str):
        hidden, delta, dtype = config.hidden_size, config.delta, linears.dtype
        heads, values = delta.value_heads, delta.value_features
        self.in_proj_qkv = linears.make(f"{path}.in_proj_qkv", delta.features, hidden, False)
        self.in_proj_z = linears.make(f"{path}.in_proj_z", values, hidden, False)
        self.in_proj_b = linears.make(f"{path}.in_proj_b", heads, hidden, False)
        self.in_proj_a = linears.make(f"{path}.in_proj_a", heads, hidden, False)
        self.conv1d = Convolution(delta.features, delta.width, dtype=dtype)
        self.A_log = nnx.Param(jnp.zeros(heads, jnp.float32))
        self.dt_bias = nnx.Param(jnp.zeros(heads, jnp.float32))
        self.norm = GatedRMSNorm(delta.value_dim, config.rms_norm_eps, dtype=dtype)
        self.out_proj = linears.make(f"{path}.out_proj", hidden, values, False)
        self.sizes, self.dtype = delta, dtype

    def make_cache(self, batch: int, slots: int) -> DeltaCache:
        """The state before the first token; however many tokens come, it is of one size."""
        del slots
        sizes = self.sizes
        heads = (sizes.value_heads, sizes.key_dim, sizes.value_dim)
        return make_delta_cache(batch, sizes.width, sizes.features, heads, self.dtype)

    def list_words(self) -> tuple[Array, ...]:
        """Packed words of the first products."""
        return list_words(self.in_proj_qkv, self.in_proj_z)

    def __call__(
        self, x: Array, piece: Piece, cache: DeltaCache | None, onto: Onto
    ) -> tuple[Stream, DeltaCache]:
        cache = self.make_cache(x.shape[0], 0) if cache is None else cache
        layers = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        linears, backend, prefer = gather(x, layers)
        net = DeltaNet(
            self.conv1d.weight[...][:, 0],
            self.A_log[...],
            self.dt_bias[...],
            self.norm.weight[...],
            norm_eps=self.norm.eps,
            key_heads=self.sizes.key_heads,
        )
        options = {"backend": backend, "prefer": prefer}
        y, cache = project_and_update(x, linears, net, cache, piece.lengths, **options)
        return Stream(*project_onto(y, self.out_proj, onto)), cache


class DecoderLayer(Layer):
    """A delta net or attention, then an MLP or experts, each added to the stream."""

    def __init__(self, config: Qwen35Config, linears: Linears, layer: int):
        hidden, eps, path = config.hidden_size, config.rms_norm_eps, f"model.layers.{layer}"
        self.input_layernorm = OffsetRMSNorm(hidden, eps, dtype=linears.dtype)
        if config.is_full[layer]:
            bias = config.attention_bias
            self.self_attn = SelfAttention(
                config,
                linears,
                f"{path}.self_attn",
                qkv_bias=bias,
                out_bias=bias,
                norm=OffsetRMSNorm,
                gated=True,
            )
        else:
            self.linear_attn = GatedDeltaNet(config, linears, f"{path}.linear_attn")
        self.is_full = config.is_full[layer]
        self.post_attention_layernorm = OffsetRMSNorm(hidden, eps, dtype=linears.dtype)
        if config.moe is not None and config.moe.sparse[layer]:
            self.mlp = SparseBlock(config.moe, hidden, linears, f"{path}.mlp")
        else:
            self.mlp = MLP(hidden, config.intermediate_size, False, linears, f"{path}.mlp")

    @property
    def mixer(self) -> Any:
        """Whichever it has: what carries tokens over to other tokens."""
        return self.self_attn if self.is_full else self.linear_attn


class Qwen35Decoder(Decoder):
    """The decoder of Qwen3.5: its cache holds keys and values, or the state of a delta net."""

    make_layer, make_norm = DecoderLayer, OffsetRMSNorm


class Qwen35(CausalLM):
    """One of these as a language model; arguments as `CausalLM`."""

    def __init__(self, config: Qwen35Config, *arguments, **options):
        super().__init__(Qwen35Decoder, config, *arguments, **options)
