"""OLMo 2 (https://arxiv.org/abs/2501.00656): norms after the layers, and over all heads together.

x = x + norm(attention(x))
x = x + norm(mlp(x))
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwna16.layers.fused import project
from jaxwna16.models.causal_lm import CausalLM, run_layer
from jaxwna16.models.olmo2.config import Olmo2Config
from jaxwna16.models.parts.attention import (
    LayerCache,
    attend,
    fold_heads,
    make_layer_cache,
    place_tokens,
    see_slots,
    write_slots,
)
from jaxwna16.models.parts.layers import MLP, Embedding, Linears, RMSNorm, normalise
from jaxwna16.models.parts.rope import rotate, rotation_tables

Array = jax.Array
Rotation = tuple[Array, Array]
Cache = tuple[LayerCache, ...]


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
        self.dtype = linears.dtype

    def make_cache(self, batch: int, slots: int) -> LayerCache:
        """Room for keys and values of `slots` tokens of each row."""
        return make_layer_cache(batch, slots, self.kv_heads, self.head_dim, self.dtype)

    def __call__(
        self, x: Array, rotation: Rotation, seen: Array, slots: Array, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*x.shape[:2], -1, self.head_dim) for y in (q, k, v))
        # cosines and sines are float32, and only the rotated heads are rounded
        q, k = (rotate(y.astype(jnp.float32), *rotation).astype(x.dtype) for y in (q, k))
        held = LayerCache(fold_heads(k), fold_heads(v))
        if cache is not None:
            held = cache = write_slots(cache, held, slots)
        return self.o_proj(attend(q, held, seen)), cache


class DecoderLayer(nnx.Module):
    """Attention and an MLP, the result of each normalised and added to the stream."""

    def __init__(self, config: Olmo2Config, linears: Linears, layer: int):
        hidden, eps, path = config.hidden_size, config.rms_norm_eps, f"model.layers.{layer}"
        self.self_attn = Attention(config, linears, f"{path}.self_attn")
        self.post_attention_layernorm = LateRMSNorm(hidden, eps, dtype=linears.dtype)
        self.mlp = MLP(hidden, config.intermediate_size, False, linears, f"{path}.mlp")
        self.post_feedforward_layernorm = LateRMSNorm(hidden, eps, dtype=linears.dtype)

    def __call__(
        self, x: Array, rotation: Rotation, seen: Array, slots: Array, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        mixed, cache = self.self_attn(x, rotation, seen, slots, cache)
        x = x + self.post_attention_layernorm(mixed)
        return x + self.post_feedforward_layernorm(self.mlp(x)), cache


class Decoder(nnx.Module):
    """Embedding, layers and the last norm: the checkpoint's `model.`."""

    def __init__(self, config: Olmo2Config, linears: Linears):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=linears.dtype)
        self.layers = nnx.List(
            DecoderLayer(config, linears, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = LateRMSNorm(config.hidden_size, config.rms_norm_eps, dtype=linears.dtype)
        self.config = config

    def make_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache: keys and values of `slots` tokens of each row, in the model's dtype."""
        return tuple(layer.self_attn.make_cache(batch, slots) for layer in self.layers)

    def __call__(
        self, tokens: Array, start: Array, count: Array, cache: Cache | None
    ) -> tuple[Array, tuple[LayerCache | None, ...]]:
        steps = tokens.shape[1]
        places = place_tokens(start, count, steps)
        seen = see_slots(places.positions, steps if cache is None else cache[0].slots, None)
        rope, features = self.config.rope, self.config.rotary_dim
        rotation = rotation_tables(rope, features, places.positions, jnp.float32)
        x, caches = self.embed_tokens(tokens), []
        for i, layer in enumerate(self.layers):
            before = None if cache is None else cache[i]
            x, after = run_layer(layer, x, rotation, seen, places.slots, before)
            caches.append(after)
        return self.norm(x), tuple(caches)


class Olmo2(CausalLM):
    """An OLMo 2 as a language model; arguments as `CausalLM`."""

    def __init__(self, config: Olmo2Config, *arguments, **options):
        super().__init__(Decoder, config, *arguments, **options)
