"""The Llama family and its relatives with experts (`LlamaConfig`) as one NNX definition.

Sparse layers are in `jaxwna16.models.parts.moe`.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.config.rope_config import RopeConfig
from jaxwna16.models.llama.config import LlamaConfig
from jaxwna16.models.parts.attention import SelfAttention
from jaxwna16.models.parts.decoder import Decoder
from jaxwna16.models.parts.decoder_layer import Layer
from jaxwna16.models.parts.layers import MLP, Linears, RMSNorm
from jaxwna16.models.parts.moe import SparseBlock


class DecoderLayer(Layer):
    """Attention, and an MLP or experts, each on a normalised input and added to the stream."""

    def __init__(self, config: LlamaConfig, linears: Linears, layer: int):
        hidden, eps, path = config.hidden_size, config.rms_norm_eps, f"model.layers.{layer}"
        self.input_layernorm = RMSNorm(hidden, eps, dtype=linears.dtype)
        self.self_attn = SelfAttention(
            config,
            linears,
            f"{path}.self_attn",
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            norm=RMSNorm if config.qk_norm else None,
            norms_across=config.norms_across,
            norms_last=config.norms_last,
            paired=config.paired,
        )
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype=linears.dtype)
        if config.moe is not None and config.moe.sparse[layer]:
            self.mlp = SparseBlock(config.moe, hidden, linears, f"{path}.mlp")
        else:
            inner, bias = config.intermediate_size, config.mlp_bias
            self.mlp = MLP(hidden, inner, bias, linears, f"{path}.mlp")
        self.residual_multiplier = config.residual_multiplier


class LlamaDecoder(Decoder):
    """The decoder of Llama and its relatives: some layers see windows only or have no rope."""

    make_layer, make_norm = DecoderLayer, RMSNorm

    def list_windows(self) -> tuple[int | None, ...]:
        return self.config.windows

    def list_ropes(self) -> list[RopeConfig | None]:
        return [self.config.rope if has_rope else None for has_rope in self.config.rotated]


class WideLlamaDecoder(LlamaDecoder):
    """The same with float32 cosines and sines: products of a rotation round once."""

    rope_dtype = jnp.float32


class Llama(CausalLM):
    """One of these as a language model; arguments as `CausalLM`."""

    def __init__(self, config: LlamaConfig, *arguments, **options):
        decoder = WideLlamaDecoder if config.wide_rope else LlamaDecoder
        super().__init__(decoder, config, *arguments, **options)
