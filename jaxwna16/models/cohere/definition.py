"""Command R (https://arxiv.org/abs/2504.00698) and its successors: attention beside the MLP.

h = norm(x)
x = x + attention(h) + mlp(h)

Norms subtract the mean. Neighbouring features of a head are rotated together, in float32, by
cosines and sines that are rounded to the model's dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.cohere.config import CohereConfig
from jaxwna16.models.config.rope_config import RopeConfig
from jaxwna16.models.parts.attention import LayerCache, SelfAttention
from jaxwna16.models.parts.decoder import Decoder
from jaxwna16.models.parts.decoder_layer import Layer
from jaxwna16.models.parts.layers import MLP, LayerNorm, Linears
from jaxwna16.models.parts.piece import Following, Piece, Stream
from pallas_kernels.formulas.norms import Onto
from pallas_kernels.formulas.rotation import Rotation


class DecoderLayer(Layer):
    """Attention and an MLP of one normalised input, both added to the stream."""

    def __init__(self, config: CohereConfig, linears: Linears, layer: int):
        hidden, path = config.hidden_size, f"model.layers.{layer}"
        self.input_layernorm = LayerNorm(hidden, config.rms_norm_eps, dtype=linears.dtype)
        self.self_attn = SelfAttention(
            config,
            linears,
            f"{path}.self_attn",
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            paired=True,
        )
        self.mlp = MLP(hidden, config.intermediate_size, False, linears, f"{path}.mlp")

    def __call__(
        self, stream: Stream, piece: Piece, cache: LayerCache | None, following: Following
    ) -> tuple[Stream, LayerCache | None]:
        onto = Onto(stream.x, ahead=self.mlp.list_words())
        after, cache = self.self_attn(stream.taken, piece, cache, onto)
        onto = Onto(after.x, early=following.norm, ahead=following.ahead)
        return Stream(*self.mlp.run_onto(stream.taken, onto)), cache


class CohereDecoder(Decoder):
    """The decoder of Command R and its successors."""

    make_layer, make_norm, rope_dtype = DecoderLayer, LayerNorm, jnp.float32

    def list_windows(self) -> tuple[int | None, ...]:
        return self.config.windows

    def list_ropes(self) -> list[RopeConfig | None]:
        return [self.config.rope if has_rope else None for has_rope in self.config.rotated]

    def make_rotation(
        self,
        rope: RopeConfig,
        positions: jax.Array,
        dtype: jax.typing.DTypeLike,
        lengths: jax.Array,
    ) -> Rotation:
        """Cosines and sines are numbers of `dtype`, but in float32."""
        rotation = super().make_rotation(rope, positions, dtype, lengths)
        digits = jnp.finfo(dtype)
        # of two casts after each other XLA would leave out both
        cos, sin = (
            lax.reduce_precision(table, digits.nexp, digits.nmant)
            for table in (rotation.cos, rotation.sin)
        )
        return rotation._replace(cos=cos, sin=sin)


class Cohere(CausalLM):
    """One of these as a language model; arguments as `CausalLM`."""

    def __init__(self, config: CohereConfig, *arguments, **options):
        super().__init__(CohereDecoder, config, *arguments, **options)
