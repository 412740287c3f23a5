"""The Llama family and its relatives with experts (`MODEL_TYPES`) as one NNX definition.

Attribute paths are the checkpoint's own tensor names (`model.layers.0.self_attn.q_proj.weight`), so
weights are loaded by path (`jaxwna16.models.params`). A linear named in `specs` is a `QuantDense`,
experts named there are a `QuantMoE`. Sparse layers are in `jaxwna16.models.moe`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwna16.fused import project
from jaxwna16.models.attention import (
    LayerCache,
    attend,
    fold_heads,
    make_layer_cache,
    place_tokens,
    see_slots,
    write_slots,
)
from jaxwna16.models.config import ModelConfig
from jaxwna16.models.layers import MLP, Dense, Embedding, Linears, RMSNorm, multiply
from jaxwna16.models.moe import SparseBlock
from jaxwna16.models.rope import rotate, rotation_tables
from pallas_kernels.spec import QuantSpec

Array = jax.Array
Rotation = tuple[Array, Array]
Cache = tuple[LayerCache, ...]
"""One `LayerCache` per layer."""


class Attention(nnx.Module):
    """Self-attention of one layer, with grouped key heads and optional per-head norms."""

    def __init__(self, config: ModelConfig, linears: Linears, path: str):
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
        self.dtype = linears.dtype

    def make_cache(self, batch: int, slots: int) -> LayerCache:
        """An empty cache for `slots` tokens of each row."""
        return make_layer_cache(batch, slots, self.kv_heads, self.head_dim, self.dtype)

    def __call__(
        self, x: Array, rotation: Rotation, seen: Array, slots: Array, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        q, k, v = (
            y.reshape(*x.shape[:2], -1, self.head_dim)
            for y in project(x, (self.q_proj, self.k_proj, self.v_proj))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        new = LayerCache(fold_heads(k), fold_heads(v))
        if cache is None:
            return self.o_proj(attend(q, new, seen)), None
        cache = write_slots(cache, new, slots)
        return self.o_proj(attend(q, cache, seen)), cache


class DecoderLayer(nnx.Module):
    """Attention, and an MLP or experts, each on a normalised input and added to the stream."""

    def __init__(self, config: ModelConfig, linears: Linears, layer: int):
        hidden, eps, path = config.hidden_size, config.rms_norm_eps, f"model.layers.{layer}"
        self.input_layernorm = RMSNorm(hidden, eps, dtype=linears.dtype)
        self.self_attn = Attention(config, linears, f"{path}.self_attn")
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype=linears.dtype)
        if config.moe is not None and config.moe.sparse[layer]:
            self.block = config.moe.block
            block = SparseBlock(config.moe, hidden, linears, f"{path}.{self.block}")
        else:
            self.block = "mlp"
            inner, bias = config.intermediate_size, config.mlp_bias
            block = MLP(hidden, inner, bias, linears, f"{path}.mlp")
        setattr(self, self.block, block)

    def make_cache(self, batch: int, slots: int) -> LayerCache:
        """What the layer keeps of `slots` tokens of each row, empty."""
        return self.self_attn.make_cache(batch, slots)

    def __call__(
        self, x: Array, rotation: Rotation, seen: Array, slots: Array, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        mixed, cache = self.self_attn(self.input_layernorm(x), rotation, seen, slots, cache)
        x = x + mixed
        block = getattr(self, self.block)
        return x + block(self.post_attention_layernorm(x)), cache


class Decoder(nnx.Module):
    """Embedding, layers and the last norm: the checkpoint's `model.`."""

    def __init__(self, config: ModelConfig, linears: Linears):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=linears.dtype)
        self.layers = nnx.List(
            DecoderLayer(config, linears, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=linears.dtype)


class Llama(nnx.Module):
    """A language model: `model(tokens)` maps int32 [B, S] to float32 logits [B, S, V].

    Constructed under `nnx.eval_shape` it holds shapes and no arrays; `load_params` fills it. It is
    a pytree, so `jax.jit` takes it as an argument.

    Attributes:
      config: what it was constructed from.
      dtype: dtype of activations, cache and plain weights. In float32 products are full float32.
      folder: the checkpoint folder it was loaded from, if any: where its tokenizer is.
      warnings: remarks about that checkpoint, what was left out by rule among them.

    Args:
      specs: module path ("lm_head", "model.layers.0.mlp.up_proj") -> spec of its packed weight. Of
        experts, `w13` (gate and up) and `w2` are such modules: "model.layers.0.mlp.experts.w13".
      reordered: paths of those whose input features were reordered (act-order).
      dtype: see the attribute.
      backend: of the quantized linears: None is the best available, a name that one or an error.

    Raises:
      ModelError: listing specs that no linear has, or that contradict the linear's shape, and
        experts of which one product is quantized and the other is not.
    """

    def __init__(
        self,
        config: ModelConfig,
        specs: Mapping[str, QuantSpec] | None = None,
        *,
        dtype: jax.typing.DTypeLike,
        backend: str | None = None,
        reordered: Collection[str] = (),
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.folder: str | None = None
        self.warnings: tuple[str, ...] = ()
        linears = Linears(specs or {}, self.dtype, backend, reordered)
        self.model = Decoder(config, linears)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else linears.make("lm_head", config.vocab_size, config.hidden_size, False)
        )
        linears.check_all_used()

    def __call__(self, tokens: Array) -> Array:
        batch, steps = tokens.shape
        start, count = jnp.zeros(batch, jnp.int32), jnp.full(batch, steps, jnp.int32)
        hidden, _ = self._run(tokens, start, count, None)
        return self.logits(hidden)

    def make_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache: keys and values of `slots` tokens of each row, in the model's dtype."""
        return tuple(layer.make_cache(batch, slots) for layer in self.model.layers)

    def hidden(
        self, tokens: Array, start: Array, count: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        """Run the layers over a piece of each row. Pieces after each other are one long piece.

        Args:
          tokens: int32 [B, S]. Those from `count` on are padding: nothing of them is kept, and
            what comes out of them means nothing.
          start: int32 [B], how many tokens of each row came before the piece.
          count: int32 [B], how many tokens of each row are in it, from 0 to S.
          cache: of the tokens before. Its slots must suffice for start + count.

        Returns:
          The normalised stream [B, S, hidden] in the model's dtype, and the cache with the piece
          added.
        """
        return self._run(tokens, start, count, cache)

    def _run(self, tokens: Array, start: Array, count: Array, cache: Any) -> tuple[Array, Any]:
        """`hidden`; without a cache, a piece that is whole rows."""
        places = place_tokens(start, count, tokens.shape[1])
        slots = tokens.shape[1] if cache is None else cache[0].slots
        windows = self.config.windows
        seen = {window: see_slots(places.positions, slots, window) for window in set(windows)}
        rotation = rotation_tables(
            self.config.rope, self.config.rotary_dim, places.positions, self.dtype
        )
        x = self.model.embed_tokens(tokens)
        caches = []
        for i, (layer, window) in enumerate(zip(self.model.layers, windows, strict=True)):
            before = None if cache is None else cache[i]
            x, after = _run_layer(layer, x, rotation, seen[window], places.slots, before)
            caches.append(after)
        return self.model.norm(x), tuple(caches)

    def logits(self, hidden: Array) -> Array:
        """Float32 logits [..., V] of the normalised stream [..., hidden]."""
        if self.lm_head is None:
            return multiply(hidden, self.model.embed_tokens.weight[...])
        if isinstance(self.lm_head, Dense):
            return multiply(hidden, self.lm_head.weight[...])
        return self.lm_head(hidden).astype(jnp.float32)


@jax.jit
def _run_layer(layer: DecoderLayer, *arguments):
    """A function of its own, so that layers of one shape are traced once and not once each."""
    return layer(*arguments)
