"""The Llama family and its relatives with experts (`LlamaConfig`) as one NNX definition.

Sparse layers are in `jaxwna16.models.parts.moe`.
"""

from __future__ import annotations

from flax import nnx

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.llama.config import LlamaConfig
from jaxwna16.models.parts.attention import LayerCache, SelfAttention
from jaxwna16.models.parts.decoder import Decoder
from jaxwna16.models.parts.layers import MLP, Linears, RMSNorm
from jaxwna16.models.parts.moe import SparseBlock
from jaxwna16.models.parts.piece import Following, Piece, Stream
from pallas_kernels.formulas.norms import Onto


class DecoderLayer(nnx.Module):
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
        )
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype=linears.dtype)
        if config.moe is not None and config.moe.sparse[layer]:
            self.mlp = SparseBlock(config.moe, hidden, linears, f"{path}.mlp")
        else:
            inner, bias = config.intermediate_size, config.mlp_bias
            self.mlp = MLP(hidden, inner, bias, linears, f"{path}.mlp")

    @property
    def mixer(self) -> SelfAttention:
        """What carries tokens over to other tokens."""
        return self.self_attn

    def make_cache(self, batch: int, slots: int) -> LayerCache:
        """What the layer keeps of `slots` tokens of each row, empty."""
        return self.mixer.make_cache(batch, slots)

    def __call__(
        self, stream: Stream, piece: Piece, cache: LayerCache | None, following: Following
    ) -> tuple[Stream, LayerCache | None]:
        norm, words = self.post_attention_layernorm.norm, self.mlp.list_words()
        onto = Onto(stream.x, early=norm, ahead=words)
        stream, cache = self.self_attn(stream.taken, piece, cache, onto)
        onto = Onto(stream.x, early=following.norm, ahead=following.ahead)
        return Stream(*self.mlp.run_onto(stream.taken, onto)), cache


class LlamaDecoder(Decoder):
    """The decoder of Llama and its relatives, some layers of which see windows only."""

    make_layer, make_norm = DecoderLayer, RMSNorm

    def list_windows(self) -> tuple[int | None, ...]:
        return self.config.windows


class Llama(CausalLM):
    """One of these as a language model; arguments as `CausalLM`."""

    def __init__(self, config: LlamaConfig, *arguments, **options):
        super().__init__(LlamaDecoder, config, *arguments, **options)
