"""Gemma 4: dense, with experts beside the MLP, and with layers that share keys and values.

Norms come before and after both parts of a layer, and a number multiplies the whole layer. The
router of the experts reads x itself:

    x = x + norm(attention(norm(x)))
    x = x + norm(mlp(norm(x)))                                     dense
    x = x + norm(norm(mlp(norm(x))) + norm(experts(norm(x))))      with experts
    x = x + norm(project(gelu(gate(x)) * token))                   with embeddings of each layer
    x = x * scalar
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxwna16.layers.fused import project_onto
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.config.moe_config import MoeConfig
from jaxwna16.models.config.rope_config import RopeConfig
from jaxwna16.models.gemma4.config import Gemma4Config
from jaxwna16.models.parts.attention import LayerCache, SelfAttention
from jaxwna16.models.parts.decoder import Cache, Decoder
from jaxwna16.models.parts.layers import MLP, Dense, Embedding, LateRMSNorm, Linears, list_words
from jaxwna16.models.parts.moe import make_experts, run_chosen
from jaxwna16.models.parts.piece import Following, Piece, Stream
from pallas_kernels.formulas.activations import apply
from pallas_kernels.formulas.norms import Onto, apply_factor, apply_norm, normalise
from pallas_kernels.formulas.rotation import rotate
from pallas_kernels.step.attention import attend
from pallas_kernels.step.residual import add_onto
from pallas_kernels.step.routing import route

Array = jax.Array


class SharingAttention(nnx.Module):
    """Attention of normalised queries to the keys and values of an earlier layer."""

    def __init__(self, config: Gemma4Config, linears: Linears, path: str, head_dim: int):
        hidden, bias = config.hidden_size, config.attention_bias
        queries = config.num_attention_heads * head_dim
        self.q_proj = linears.make(f"{path}.q_proj", queries, hidden, bias)
        self.q_norm = LateRMSNorm(head_dim, config.rms_norm_eps, dtype=linears.dtype)
        self.o_proj = linears.make(f"{path}.o_proj", hidden, queries, bias)
        self.head_dim, self.scale, self.backend = head_dim, config.attention_scale, linears.backend

    def make_cache(self, batch: int, slots: int) -> None:
        """None: another layer's is taken."""
        del batch, slots

    def list_words(self) -> tuple[Array, ...]:
        """Packed words of the first product."""
        return list_words(self.q_proj)

    def __call__(
        self, x: Array, piece: Piece, cache: LayerCache, onto: Onto
    ) -> tuple[Stream, None]:
        """As of other attention; the cache is the other layer's, which has the piece already."""
        rotation = piece.rotation
        assert rotation is not None
        q = self.q_proj(x)
        q = self.q_norm(q.reshape(*q.shape[:-1], -1, self.head_dim))
        mixed = attend(
            rotate(q, rotation.cos, rotation.sin),
            *cache,
            piece.start,
            piece.lengths,
            piece.window,
            scale=self.scale,
            backend=self.backend,
        )
        return Stream(*project_onto(mixed, self.o_proj, onto)), None


def make_attention(
    config: Gemma4Config, linears: Linears, path: str, layer: int
) -> SelfAttention | SharingAttention:
    """That of a layer, with keys and values of its own or without."""
    head_dim, bias = config.find_head_dim(layer), config.attention_bias
    if config.sources[layer] is not None:
        return SharingAttention(config, linears, path, head_dim)
    return SelfAttention(
        config,
        linears,
        path,
        qkv_bias=bias,
        out_bias=bias,
        norm=LateRMSNorm,
        head_dim=head_dim,
        kv_heads=config.kv_heads[layer],
        has_values=not (config.keys_are_values and config.windows[layer] is None),
        norms_values=True,
    )


class Router(nnx.Module):
    """Chosen experts and their weights: softmax of a scaled norm of x, renormalised and scaled."""

    def __init__(self, moe: MoeConfig, hidden: int, eps: float, linears: Linears):
        dtype = linears.dtype
        self.proj = Dense(moe.experts, hidden, use_bias=False, dtype=dtype)
        self.scale = nnx.Param(jnp.ones(hidden, dtype))
        self.per_expert_scale = nnx.Param(jnp.ones(moe.experts, dtype))
        self.routing, self.eps, self.backend = moe.routing, eps, linears.backend

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """ids int32 and weights float32 [..., top_k] of x [..., H]."""
        scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
        y = normalise(x, self.eps).astype(x.dtype) * scale
        logits = self.proj(apply_factor(y, x.shape[-1] ** -0.5))
        ids, weights = route(logits, backend=self.backend, **dataclasses.asdict(self.routing))
        return ids, weights * self.per_expert_scale[...].astype(jnp.float32)[ids]


class DecoderLayer(nnx.Module):
    """Attention, an MLP with or without experts beside it, and the token's own embedding."""

    def __init__(self, config: Gemma4Config, linears: Linears, layer: int):
        hidden, path = config.hidden_size, f"model.layers.{layer}"

        def make_norm():
            return LateRMSNorm(hidden, config.rms_norm_eps, dtype=linears.dtype)

        self.input_layernorm = make_norm()
        self.self_attn = make_attention(config, linears, f"{path}.self_attn", layer)
        self.post_attention_layernorm = make_norm()
        self.pre_feedforward_layernorm = make_norm()
        inner = config.inner[layer]
        self.mlp = MLP(hidden, inner, False, linears, f"{path}.mlp", config.activation)
        self.post_feedforward_layernorm = make_norm()
        self.layer_scalar = nnx.Param(jnp.ones(1, linears.dtype))
        self.has_experts, self.has_token = config.moe is not None, config.per_layer_size > 0
        if config.moe is not None:
            self.router = Router(config.moe, hidden, config.rms_norm_eps, linears)
            self.experts = make_experts(
                config.moe, hidden, linears, f"{path}.experts", config.activation
            )
            self.post_feedforward_layernorm_1 = make_norm()
            self.post_feedforward_layernorm_2 = make_norm()
            self.pre_feedforward_layernorm_2 = make_norm()
        if size := config.per_layer_size:
            gate, back = "per_layer_input_gate", "per_layer_projection"
            self.per_layer_input_gate = linears.make(f"{path}.{gate}", size, hidden, False)
            self.per_layer_projection = linears.make(f"{path}.{back}", hidden, size, False)
            self.post_per_layer_input_norm = make_norm()
        self.activation, self.backend = config.activation, linears.backend

    @property
    def mixer(self) -> SelfAttention | SharingAttention:
        """What carries tokens over to other tokens."""
        return self.self_attn

    def make_cache(self, batch: int, slots: int) -> LayerCache | None:
        """What the layer keeps of `slots` tokens of each row, empty."""
        return self.self_attn.make_cache(batch, slots)

    def __call__(
        self, stream: Stream, piece: Piece, cache: Any, following: Following
    ) -> tuple[Stream, Any]:
        """The stream [B, S, hidden] behind the layer, and the cache with the piece."""
        norms = self.post_attention_layernorm.norm, self.pre_feedforward_layernorm.norm
        onto = Onto(stream.x, *norms, self.mlp.list_words())
        stream, cache = self.self_attn(stream.taken, piece, cache, onto)
        onto = Onto(stream.x, self.post_feedforward_layernorm.norm)
        if self.has_experts:
            both = self._run_both(stream)
            x, _ = add_onto(both, onto, backend=self.backend)
        else:
            x, _ = self.mlp.run_onto(stream.taken, onto)
        if self.has_token:
            x = self._add_token(x, piece)
        x = x * jnp.expand_dims(self.layer_scalar[...], range(x.ndim - 1))
        return Stream(x, None if following.norm is None else apply_norm(x, following.norm)), cache

    def _run_both(self, stream: Stream) -> Array:
        """MLP and experts, which read the stream itself."""
        dense = self.post_feedforward_layernorm_1(self.mlp(stream.taken))
        ids, weights = self.router(stream.x)
        sparse = run_chosen(self.experts, self.pre_feedforward_layernorm_2(stream.x), ids, weights)
        return dense + self.post_feedforward_layernorm_2(sparse)

    def _add_token(self, x: Array, piece: Piece) -> Array:
        """The stream with what the layer knows of each token by itself."""
        assert piece.beside is not None
        gate = self.per_layer_input_gate(x)
        y = apply(self.activation, gate.astype(jnp.float32)).astype(x.dtype) * piece.beside
        onto = Onto(x, self.post_per_layer_input_norm.norm)
        return project_onto(y, self.per_layer_projection, onto)[0]


class Gemma4Decoder(Decoder):
    """The decoder of Gemma 4; embeddings of each layer are rows of one table."""

    make_layer, make_norm, rounds_multiplier = DecoderLayer, LateRMSNorm, True
    config: Gemma4Config

    def __init__(self, config: Gemma4Config, linears: Linears):
        super().__init__(config, linears)
        if not config.per_layer_size:
            return
        dtype, size = linears.dtype, config.per_layer_size
        features = config.num_hidden_layers * size
        self.embed_tokens_per_layer = Embedding(
            config.per_layer_vocab,
            features,
            dtype=dtype,
            multiplier=float(np.asarray(size**0.5, dtype)),
        )
        self.per_layer_model_projection = linears.make(
            "model.per_layer_model_projection", features, config.hidden_size, False
        )
        self.per_layer_projection_norm = LateRMSNorm(size, config.rms_norm_eps, dtype=dtype)

    def list_windows(self) -> tuple[int | None, ...]:
        return self.config.windows

    def list_ropes(self) -> list[RopeConfig | None]:
        rope, full = self.config.rope, self.config.global_rope
        return [full if window is None else rope for window in self.config.windows]

    def list_beside(self, tokens: Array, x: Array) -> Sequence[Array | None]:
        """Per layer [B, S, features]: of the token itself, and of its embedding."""
        if not self.config.per_layer_size:
            return super().list_beside(tokens, x)
        shape = (*tokens.shape, self.config.num_hidden_layers, self.config.per_layer_size)
        own = self.embed_tokens_per_layer(tokens).reshape(shape)
        seen = apply_factor(self.per_layer_model_projection(x), self.config.hidden_size**-0.5)
        seen = self.per_layer_projection_norm(seen.reshape(shape))
        both = apply_factor(seen + own, 2.0**-0.5)
        return [both[:, :, i] for i in range(self.config.num_hidden_layers)]

    def find_before(self, layer: int, cache: Cache | None, so_far: Sequence[Any], x: Array) -> Any:
        """The layer's own cache, or that of the layer whose keys and values it takes."""
        source = self.config.sources[layer]
        if source is not None:
            return so_far[source]
        if cache is None and layer in self.config.sources:
            return self.layers[layer].make_cache(*x.shape[:2])
        return super().find_before(layer, cache, so_far, x)


class Gemma4(CausalLM):
    """A Gemma 4 as a language model; arguments as `CausalLM`."""

    def __init__(self, config: Gemma4Config, *arguments, **options):
        super().__init__(Gemma4Decoder, config, *arguments, **options)
