"""Gemma (https://arxiv.org/abs/2408.00118): norms before and after both parts of a layer.

x = x + norm(attention(norm(x)))
x = x + norm(mlp(norm(x)))
"""

from __future__ import annotations

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.gemma.config import GemmaConfig
from jaxwna16.models.parts.attention import SelfAttention
from jaxwna16.models.parts.decoder import Decoder
from jaxwna16.models.parts.decoder_layer import Layer, Norms
from jaxwna16.models.parts.layers import MLP, Linears, OffsetRMSNorm


class DecoderLayer(Layer):
    """Attention and an MLP, each between two norms."""

    def __init__(self, config: GemmaConfig, linears: Linears, layer: int):
        hidden, eps, path = config.hidden_size, config.rms_norm_eps, f"model.layers.{layer}"
        inner, bias = config.intermediate_size, config.attention_bias
        self.input_layernorm = OffsetRMSNorm(hidden, eps, dtype=linears.dtype)
        self.self_attn = SelfAttention(
            config, linears, f"{path}.self_attn", qkv_bias=bias, out_bias=bias
        )
        self.post_attention_layernorm = OffsetRMSNorm(hidden, eps, dtype=linears.dtype)
        self.pre_feedforward_layernorm = OffsetRMSNorm(hidden, eps, dtype=linears.dtype)
        self.mlp = MLP(hidden, inner, False, linears, f"{path}.mlp", config.activation)
        self.post_feedforward_layernorm = OffsetRMSNorm(hidden, eps, dtype=linears.dtype)

    def find_norms(self) -> Norms:
        return Norms(
            mixed=self.post_attention_layernorm.norm,
            mlp=self.pre_feedforward_layernorm.norm,
            added=self.post_feedforward_layernorm.norm,
        )


class GemmaDecoder(Decoder):
    """The decoder of Gemma, some layers of which see windows only."""

    make_layer, make_norm, rounds_multiplier = DecoderLayer, OffsetRMSNorm, True

    def list_windows(self) -> tuple[int | None, ...]:
        return self.config.windows


class Gemma(CausalLM):
    """A Gemma as a language model; arguments as `CausalLM`."""

    def __init__(self, config: GemmaConfig, *arguments, **options):
        super().__init__(GemmaDecoder, config, *arguments, **options)
