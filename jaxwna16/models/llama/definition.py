"""The Llama family and its relatives with experts (`LlamaConfig`) as one NNX definition.

Sparse layers are in `jaxwna16.models.parts.moe`.
"""

from __future__ import annotations

import jax
from flax import nnx

from jaxwna16.layers.fused import project
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.llama.config import LlamaConfig
from jaxwna16.models.parts.attention import (
    LayerCache,
    fold_heads,
    make_layer_cache,
    write_slots,
)
from jaxwna16.models.parts.decoder import Decoder, Piece
from jaxwna16.models.parts.layers import MLP, Linears, RMSNorm
from jaxwna16.models.parts.moe import SparseBlock
from jaxwna16.models.parts.rope import rotate
from pallas_kernels.attention import attend

Array = jax.Array


class Attention(nnx.Module):
    """Self-attention of one layer, with grouped key heads and optional per-head norms."""

    def __init__(self, config: LlamaConfig, linears: Linears, path: str):
        hidden, head_dim = config.hidden_size, config.head_dim
        q_features = config.num_attention_heads * head_dim
        kv_features = config.num_key_value_heads * head_dim
        self.q_proj = linears.make(f"{path}.q_proj", q_features, hidden, config.qkv_bias)
        self.k_proj = linears.make(f"{path}.k_proj", kv_features, hidden, config.qkv_bias)
        self.v_proj = linears.make(f"{path}.v_proj", kv_features, hidden, config.qkv_bias)
        self.o_proj = linears.make(f"{path}.o_proj", hidden, q_features, config.out_bias)
        norms = [RMSNorm(head_dim, config.rms_norm_eps, dtype=linears.dtype) for _ in range(2)]
        self.q_norm, self.k_norm = norms if config.qk_norm else (None, None)
        self.head_dim = head_dim
        self.kv_heads = config.num_key_value_heads
        self.dtype, self.backend = linears.dtype, linears.backend

    def make_cache(self, batch: int, slots: int) -> LayerCache:
        """An empty cache for `slots` tokens of each row."""
        return make_layer_cache(batch, slots, self.kv_heads, self.head_dim, self.dtype)

    def __call__(
        self, x: Array, piece: Piece, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        q, k, v = (
            y.reshape(*x.shape[:2], -1, self.head_dim)
            for y in project(x, (self.q_proj, self.k_proj, self.v_proj))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *piece.rotation), rotate(k, *piece.rotation)
        held = LayerCache(fold_heads(k), fold_heads(v))
        if cache is not None:
            held = cache = write_slots(cache, held, piece.slots)
        return self.o_proj(attend(q, *held, *piece.seen, backend=self.backend)), cache


class DecoderLayer(nnx.Module):
    """Attention, and an MLP or experts, each on a normalised input and added to the stream."""

    def __init__(self, config: LlamaConfig, linears: Linears, layer: int):
        hidden, eps, path = config.hidden_size, config.rms_norm_eps, f"model.layers.{layer}"
        self.input_layernorm = RMSNorm(hidden, eps, dtype=linears.dtype)
        self.self_attn = Attention(config, linears, f"{path}.self_attn")
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype=linears.dtype)
        if config.moe is not None and config.moe.sparse[layer]:
            self.mlp = SparseBlock(config.moe, hidden, linears, f"{path}.mlp")
        else:
            inner, bias = config.intermediate_size, config.mlp_bias
            self.mlp = MLP(hidden, inner, bias, linears, f"{path}.mlp")

    def make_cache(self, batch: int, slots: int) -> LayerCache:
        """What the layer keeps of `slots` tokens of each row, empty."""
        return self.self_attn.make_cache(batch, slots)

    def __call__(
        self, x: Array, piece: Piece, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        mixed, cache = self.self_attn(self.input_layernorm(x), piece, cache)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class LlamaDecoder(Decoder):
    """The decoder of Llama and its relatives, some layers of which see windows only."""

    make_layer, make_norm = DecoderLayer, RMSNorm

    def list_windows(self) -> tuple[int | None, ...]:
        return self.config.windows


class Llama(CausalLM):
    """One of these as a language model; arguments as `CausalLM`."""

    def __init__(self, config: LlamaConfig, *arguments, **options):
        super().__init__(LlamaDecoder, config, *arguments, **options)
