"""DeepSeek-V3 (https://arxiv.org/abs/2412.19437) and its relatives: latent attention and experts.

x = x + attention(norm(x))
x = x + mlp(norm(x))

The first layers have one MLP, the others experts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxwna16.errors import InputError
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.deepseek.attention import LatentAttention
from jaxwna16.models.deepseek.config import DeepseekConfig
from jaxwna16.models.parts.decoder import Cache, Decoder
from jaxwna16.models.parts.decoder_layer import Layer
from jaxwna16.models.parts.layers import MLP, Linears, RMSNorm
from jaxwna16.models.parts.moe import SparseBlock

Array = jax.Array


class DecoderLayer(Layer):
    """Latent attention, and an MLP or experts, each on a normalised input."""

    def __init__(self, config: DeepseekConfig, linears: Linears, layer: int):
        hidden, eps, path = config.hidden_size, config.rms_norm_eps, f"model.layers.{layer}"
        self.input_layernorm = RMSNorm(hidden, eps, dtype=linears.dtype)
        self.self_attn = LatentAttention(config, linears, f"{path}.self_attn")
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype=linears.dtype)
        if config.moe is not None and config.moe.sparse[layer]:
            self.mlp = SparseBlock(config.moe, hidden, linears, f"{path}.mlp")
        else:
            self.mlp = MLP(hidden, config.intermediate_size, False, linears, f"{path}.mlp")


class DeepseekDecoder(Decoder):
    """The decoder of DeepSeek-V3 and its relatives."""

    make_layer, make_norm = DecoderLayer, RMSNorm

    def __call__(self, tokens: Array, *arguments: Any) -> tuple[Array, Cache]:
        """As `Decoder`.

        Raises:
          InputError: if a piece alone has more tokens than an indexer keeps.
        """
        limit, steps = self.config.index_topk, tokens.shape[1]
        if limit is not None and isinstance(steps, int) and steps > limit:  # else symbolic
            raise InputError(
                f"tokens: expected at most {limit} in a row, got {steps} "
                f"({self.config.length_reason})"
            )
        return super().__call__(tokens, *arguments)


class WideDeepseekDecoder(DeepseekDecoder):
    """The same with float32 cosines and sines: products of a rotation round once."""

    rope_dtype = jnp.float32


class Deepseek(CausalLM):
    """One of these as a language model; arguments as `CausalLM`."""

    def __init__(self, config: DeepseekConfig, *arguments, **options):
        decoder = WideDeepseekDecoder if config.wide_rope else DeepseekDecoder
        super().__init__(decoder, config, *arguments, **options)
