"""OLMo 2 (https://arxiv.org/abs/2501.00656): norms after the layers, and over all heads together.

x = x + norm(attention(x))
x = x + norm(mlp(x))
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.olmo2.config import Olmo2Config
from jaxwna16.models.parts.attention import LayerCache, SelfAttention
from jaxwna16.models.parts.decoder import Decoder
from jaxwna16.models.parts.decoder_layer import Layer
from jaxwna16.models.parts.layers import MLP, LateRMSNorm, Linears
from jaxwna16.models.parts.piece import Following, Piece, Stream
from pallas_kernels.formulas.norms import Onto


class DecoderLayer(Layer):
    """Attention and an MLP, the result of each normalised and added to the stream."""

    def __init__(self, config: Olmo2Config, linears: Linears, layer: int):
        hidden, eps, path = config.hidden_size, config.rms_norm_eps, f"model.layers.{layer}"
        bias = config.attention_bias
        self.self_attn = SelfAttention(
            config,
            linears,
            f"{path}.self_attn",
            qkv_bias=bias,
            out_bias=bias,
            norm=LateRMSNorm,
            norms_across=True,
        )
        self.post_attention_layernorm = LateRMSNorm(hidden, eps, dtype=linears.dtype)
        self.mlp = MLP(hidden, config.intermediate_size, False, linears, f"{path}.mlp")
        self.post_feedforward_layernorm = LateRMSNorm(hidden, eps, dtype=linears.dtype)

    def __call__(
        self, stream: Stream, piece: Piece, cache: LayerCache | None, following: Following
    ) -> tuple[Stream, LayerCache | None]:
        norm, words = self.post_attention_layernorm.norm, self.mlp.list_words()
        onto = Onto(stream.x, late=norm, ahead=words)
        stream, cache = self.self_attn(stream.taken, piece, cache, onto)
        onto = Onto(
            stream.x,
            late=self.post_feedforward_layernorm.norm,
            early=following.norm,
            ahead=following.ahead,
        )
        return Stream(*self.mlp.run_onto(stream.taken, onto)), cache


class Olmo2Decoder(Decoder):
    """The decoder of OLMo 2, whose cosines and sines are float32."""

    make_layer, make_norm, rope_dtype = DecoderLayer, LateRMSNorm, jnp.float32


class Olmo2(CausalLM):
    """An OLMo 2 as a language model; arguments as `CausalLM`."""

    def __init__(self, config: Olmo2Config, *arguments, **options):
        super().__init__(Olmo2Decoder, config, *arguments, **options)
