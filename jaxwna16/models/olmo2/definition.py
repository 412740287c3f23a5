"""OLMo 2 (https://arxiv.org/abs/2501.00656) and its relatives: norms after the layers.

x = x + norm(attention(x))
x = x + norm(mlp(x))

OLMo 2 and OLMo 3 normalise queries and keys over all heads together, and round late. EXAONE 4
(https://arxiv.org/abs/2507.11407) normalises each head, and rounds where Llama does.
"""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.config.rope_config import RopeConfig
from jaxwna16.models.olmo2.config import Olmo2Config
from jaxwna16.models.parts.attention import SelfAttention
from jaxwna16.models.parts.decoder import Decoder
from jaxwna16.models.parts.decoder_layer import Layer, Norms
from jaxwna16.models.parts.layers import MLP, LateRMSNorm, Linears, RMSNorm


class DecoderLayer(Layer):
    """Attention and an MLP, the result of each normalised and added to the stream."""

    make_norm: ClassVar[type[RMSNorm]] = LateRMSNorm
    norms_across: ClassVar[bool] = True

    def __init__(self, config: Olmo2Config, linears: Linears, layer: int):
        hidden, eps, path = config.hidden_size, config.rms_norm_eps, f"model.layers.{layer}"
        bias, make_norm = config.attention_bias, type(self).make_norm
        self.self_attn = SelfAttention(
            config,
            linears,
            f"{path}.self_attn",
            qkv_bias=bias,
            out_bias=bias,
            norm=make_norm,
            norms_across=self.norms_across,
        )
        self.post_attention_layernorm = make_norm(hidden, eps, dtype=linears.dtype)
        self.mlp = MLP(hidden, config.intermediate_size, False, linears, f"{path}.mlp")
        self.post_feedforward_layernorm = make_norm(hidden, eps, dtype=linears.dtype)

    def find_norms(self) -> Norms:
        return Norms(
            mixed=self.post_attention_layernorm.norm, added=self.post_feedforward_layernorm.norm
        )


class Exaone4Layer(DecoderLayer):
    """The same with the norms of EXAONE 4."""

    make_norm, norms_across = RMSNorm, False


class Olmo2Decoder(Decoder):
    """The decoder of OLMo 2 and OLMo 3, whose cosines and sines are float32."""

    make_layer, make_norm, rope_dtype = DecoderLayer, LateRMSNorm, jnp.float32

    def list_windows(self) -> tuple[int | None, ...]:
        return self.config.windows

    def list_ropes(self) -> list[RopeConfig | None]:
        ropes = self.config.ropes
        return [None if i is None else ropes[i] for i in self.config.rotations]


class Exaone4Decoder(Olmo2Decoder):
    """The decoder of EXAONE 4."""

    make_layer, make_norm, rope_dtype = Exaone4Layer, RMSNorm, None


class Olmo2(CausalLM):
    """An OLMo 2 or 3 as a language model; arguments as `CausalLM`."""

    def __init__(self, config: Olmo2Config, *arguments, **options):
        super().__init__(Olmo2Decoder, config, *arguments, **options)


class Exaone4(CausalLM):
    """An EXAONE 4 as a language model; arguments as `CausalLM`."""

    def __init__(self, config: Olmo2Config, *arguments, **options):
        super().__init__(Exaone4Decoder, config, *arguments, **options)
