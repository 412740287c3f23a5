"""GLM-4 (https://arxiv.org/abs/2406.12793): norms around both parts, neighbours are rotated.

x = x + norm(attention(norm(x)))
x = x + norm(mlp(norm(x)))
"""

from __future__ import annotations

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.glm4.config import Glm4Config
from jaxwna16.models.parts.attention import SelfAttention
from jaxwna16.models.parts.decoder import Decoder
from jaxwna16.models.parts.decoder_layer import Layer, Norms
from jaxwna16.models.parts.layers import MLP, Linears, RMSNorm


class DecoderLayer(Layer):
    """Attention and an MLP, each between two norms."""

    def __init__(self, config: Glm4Config, linears: Linears, layer: int):
        hidden, eps, path = config.hidden_size, config.rms_norm_eps, f"model.layers.{layer}"
        self.input_layernorm = RMSNorm(hidden, eps, dtype=linears.dtype)
        self.self_attn = SelfAttention(
            config, linears, f"{path}.self_attn", qkv_bias=config.qkv_bias, paired=True
        )
        self.post_self_attn_layernorm = RMSNorm(hidden, eps, dtype=linears.dtype)
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype=linears.dtype)
        self.mlp = MLP(hidden, config.intermediate_size, False, linears, f"{path}.mlp")
        self.post_mlp_layernorm = RMSNorm(hidden, eps, dtype=linears.dtype)

    def find_norms(self) -> Norms:
        return Norms(
            mixed=self.post_self_attn_layernorm.norm,
            mlp=self.post_attention_layernorm.norm,
            added=self.post_mlp_layernorm.norm,
        )


class Glm4Decoder(Decoder):
    """The decoder of GLM-4."""

    make_layer, make_norm = DecoderLayer, RMSNorm


class Glm4(CausalLM):
    """A GLM-4 as a language model; arguments as `CausalLM`."""

    def __init__(self, config: Glm4Config, *arguments, **options):
        super().__init__(Glm4Decoder, config, *arguments, **options)
