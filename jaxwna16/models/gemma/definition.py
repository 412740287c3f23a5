"""Gemma 2 and 3 (https://arxiv.org/abs/2408.00118, https://arxiv.org/abs/2503.19786).

Norms come before and after both parts of a layer:

x = x + norm(attention(norm(x)))
x = x + norm(mlp(norm(x)))
"""

from __future__ import annotations

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.config.rope_config import RopeConfig
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
            config,
            linears,
            f"{path}.self_attn",
            qkv_bias=bias,
            out_bias=bias,
            norm=OffsetRMSNorm if config.qk_norm else None,
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
    """The decoder of Gemma: some layers see windows only, and may have a rope of their own."""

    make_layer, make_norm, rounds_multiplier = DecoderLayer, OffsetRMSNorm, True

    def list_windows(self) -> tuple[int | None, ...]:
        return self.config.windows

    def list_ropes(self) -> list[RopeConfig | None]:
        rope, local = self.config.rope, self.config.local_rope or self.config.rope
        return [rope if window is None else local for window in self.config.windows]


class Gemma(CausalLM):
    """A Gemma as a language model; arguments as `CausalLM`."""

    def __init__(self, config: GemmaConfig, *arguments, **options):
        super().__init__(GemmaDecoder, config, *arguments, **options)
