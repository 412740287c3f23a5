"""Self-attention of a layer, and the preallocated cache in which every row keeps its positions."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwna16.layers.fused import gather, project_onto
from jaxwna16.models.config.language_config import LanguageConfig
from jaxwna16.models.parts.layers import Linears, RMSNorm, list_words
from jaxwna16.models.parts.piece import Piece, Stream
from pallas_kernels.formulas.heads import Heads
from pallas_kernels.formulas.norms import Onto
from pallas_kernels.step.attention import project_and_attend


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [B * kv_heads, C, D]; position p of a row is in slot p.

    Row and head are one axis because both products want that shape: with two axes, XLA on CPU
    copied the whole cache in every decoding step of a batch of one.

    Slots past a row's last token hold zeros, or what a longer row left there. They are never seen:
    a query at position p reads slots 0 .. p only, and slot p is written before it is read.
    """

    k: jax.Array
    v: jax.Array

    @property
    def slots(self) -> int:
        """C, how many tokens of a row there is room for."""
        return self.k.shape[1]


class SelfAttention(nnx.Module):
    """Causal self-attention with grouped key heads; paths are those of the checkpoint.

    Args:
      qkv_bias, out_bias: which linears have a bias.
      norm: the class of the norms of queries and keys, or None.
      norms_across: whether a norm is of all heads together, and not of each.
      norms_last: whether a head is normalised after it is rotated.
      gated: whether the result is multiplied by the sigmoid of a gate: rows of `q_proj` are, of
        each head, those of the query and then those of the gate.
      paired: whether neighbouring features are rotated together, see `rotate`.
      head_dim, kv_heads: of this layer, where not all layers are alike; None is the model's.
      has_values: whether there are projections of values; otherwise they are the keys before their
        norm.
      norms_values: whether each head's value is normalised, by no weight.
    """

    def __init__(
        self,
        config: LanguageConfig,
        linears: Linears,
        path: str,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        norm: type[RMSNorm] | None = None,
        norms_across: bool = False,
        norms_last: bool = False,
        gated: bool = False,
        paired: bool = False,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        has_values: bool = True,
        norms_values: bool = False,
    ):
        hidden, head_dim = config.hidden_size, head_dim or config.head_dim
        kv_heads = kv_heads or config.num_key_value_heads
        queries, keys = config.num_attention_heads * head_dim, kv_heads * head_dim
        rows = 2 * queries if gated else queries
        self.q_proj = linears.make(f"{path}.q_proj", rows, hidden, qkv_bias)
        self.k_proj = linears.make(f"{path}.k_proj", keys, hidden, qkv_bias)
        self.v_proj = linears.make(f"{path}.v_proj", keys, hidden, qkv_bias) if has_values else None
        self.o_proj = linears.make(f"{path}.o_proj", hidden, queries, out_bias)
        self.q_norm, self.k_norm = (
            None
            if norm is None
            else norm(size if norms_across else head_dim, config.rms_norm_eps, dtype=linears.dtype)
            for size in (queries, keys)
        )
        self.heads = Heads(
            head_dim=head_dim,
            kv_heads=kv_heads,
            gated=gated,
            norms_across=norms_across,
            norms_last=norms_last,
            scale=config.attention_scale,
            paired=paired,
            softcap=config.attention_softcap,
            value_eps=config.rms_norm_eps if norms_values else None,
        )
        self.dtype = linears.dtype

    def make_cache(self, batch: int, slots: int) -> LayerCache:
        """An empty cache, zeros, with room for `slots` tokens of each row."""
        shape = (batch * self.heads.kv_heads, slots, self.heads.head_dim)
        return LayerCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def list_words(self) -> tuple[jax.Array, ...]:
        """Packed words of the first products."""
        return list_words(self.q_proj, self.k_proj, self.v_proj)

    def __call__(
        self, x: jax.Array, piece: Piece, cache: LayerCache | None, onto: Onto
    ) -> tuple[Stream, LayerCache | None]:
        layers = (self.q_proj, self.k_proj, *(() if self.v_proj is None else (self.v_proj,)))
        linears, backend, prefer = gather(x, layers)
        q_norm, k_norm = (None if n is None else n.norm for n in (self.q_norm, self.k_norm))
        mixed, held = project_and_attend(
            x,
            linears,
            (q_norm, k_norm),
            piece.rotation,
            piece.start,
            piece.lengths,
            piece.window,
            cache,
            heads=self.heads,
            backend=backend,
            prefer=prefer,
        )
        stream = Stream(*project_onto(mixed, self.o_proj, onto))
        return stream, None if held is None else LayerCache(*held)
