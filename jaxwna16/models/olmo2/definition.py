"""OLMo 2 (https://arxiv.org/abs/2501.00656): norms after the layers, and over all heads together.

x = x + norm(attention(x))
x = x + norm(mlp(x))
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwna16.layers.fused import project
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.olmo2.config import Olmo2Config
from jaxwna16.models.parts.attention import (
    LayerCache,
    fold_heads,
    make_layer_cache,
    write_slots,
)
from jaxwna16.models.parts.decoder import Decoder, Piece
from jaxwna16.models.parts.layers import MLP, Linears, RMSNorm, normalise
from jaxwna16.models.parts.rope import rotate
from pallas_kernels.attention import attend

Array = jax.Array


class LateRMSNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once."""

    def __call__(self, x: Array) -> Array:
        weight = jnp.expand_dims(self.weight[...].astype(jnp.float32), range(x.ndim - 1))
        return (normalise(x, self.eps) * weight).astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention whose queries and keys are normalised before they are cut into heads."""

    def __init__(self, config: Olmo2Config, linears: Linears, path: str):
        hidden, bias, eps = config.hidden_size, config.attention_bias, config.rms_norm_eps
        q_features = config.num_attention_heads * config.head_dim
        kv_features = config.num_key_value_heads * config.head_dim
        self.q_proj = linears.make(f"{path}.q_proj", q_features, hidden, bias)
        self.k_proj = linears.make(f"{path}.k_proj", kv_features, hidden, bias)
        self.v_proj = linears.make(f"{path}.v_proj", kv_features, hidden, bias)
        self.o_proj = linears.make(f"{path}.o_proj", hidden, q_features, bias)
        self.q_norm = LateRMSNorm(q_features, eps, dtype=linears.dtype)
        self.k_norm = LateRMSNorm(kv_features, eps, dtype=linears.dtype)
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.dtype, self.backend = linears.dtype, linears.backend

    def make_cache(self, batch: int, slots: int) -> LayerCache:
        """Room for keys and values of `slots` tokens of each row."""
        return make_layer_cache(batch, slots, self.kv_heads, self.head_dim, self.dtype)

    def __call__(
        self, x: Array, piece: Piece, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*x.shape[:2], -1, self.head_dim) for y in (q, k, v))
        # cosines and sines are float32, and only the rotated heads are rounded
        q, k = (rotate(y.astype(jnp.float32), *piece.rotation).astype(x.dtype) for y in (q, k))
        held = LayerCache(fold_heads(k), fold_heads(v))
        if cache is not None:
            held = cache = write_slots(cache, held, piece.slots)
        return self.o_proj(attend(q, *held, *piece.seen, backend=self.backend)), cache


class DecoderLayer(nnx.Module):
    """Attention and an MLP, the result of each normalised and added to the stream."""

    def __init__(self, config: Olmo2Config, linears: Linears, layer: int):
        hidden, eps, path = config.hidden_size, config.rms_norm_eps, f"model.layers.{layer}"
        self.self_attn = Attention(config, linears, f"{path}.self_attn")
        self.post_attention_layernorm = LateRMSNorm(hidden, eps, dtype=linears.dtype)
        self.mlp = MLP(hidden, config.intermediate_size, False, linears, f"{path}.mlp")
        self.post_feedforward_layernorm = LateRMSNorm(hidden, eps, dtype=linears.dtype)

    def make_cache(self, batch: int, slots: int) -> LayerCache:
        """What the layer keeps of `slots` tokens of each row, empty."""
        return self.self_attn.make_cache(batch, slots)

    def __call__(
        self, x: Array, piece: Piece, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        mixed, cache = self.self_attn(x, piece, cache)
        x = x + self.post_attention_layernorm(mixed)
        return x + self.post_feedforward_layernorm(self.mlp(x)), cache


class Olmo2Decoder(Decoder):
    """The decoder of OLMo 2, whose cosines and sines are float32."""

    make_layer, make_norm, rope_dtype = DecoderLayer, LateRMSNorm, jnp.float32


class Olmo2(CausalLM):
    """An OLMo 2 as a language model; arguments as `CausalLM`."""

    def __init__(self, config: Olmo2Config, *arguments, **options):
        super().__init__(Olmo2Decoder, config, *arguments, **options)
