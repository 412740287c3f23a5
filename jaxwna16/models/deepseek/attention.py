"""Multi-head latent attention, and the cache of what all heads share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwna16.layers.fused import project, project_onto
from jaxwna16.models.deepseek.config import DeepseekConfig
from jaxwna16.models.parts.layers import Dense, Linears, RMSNorm, list_words
from jaxwna16.models.parts.piece import Piece, Stream
from pallas_kernels.formulas.norms import Onto
from pallas_kernels.formulas.rotation import rotate
from pallas_kernels.step.latent_attention import attend_latents, write_latents

_EPS = 1e-6
"""Of the norms of latents, whatever `rms_norm_eps` says, as in transformers."""


class LatentCache(NamedTuple):
    """What one layer keeps of each token: nothing of it is of a single head.

    Attributes:
      latent: [B, C, R], normalised; position p of a row is in slot p.
      key: [B, C, P], rotated.

    Slots past a row's last token hold zeros, or what a longer row left there; they are never seen.
    """

    latent: jax.Array
    key: jax.Array


class LatentAttention(nnx.Module):
    """Causal self-attention whose keys and values come from one latent a token.

    Paths are those of the checkpoint, but for `kv_b_proj`: its rows are W_k and W_v of each head,
    which are `k_b_proj` and `v_b_proj` here. They are floats even where files hold them packed,
    since one token multiplies with W_k from its other side.
    """

    def __init__(self, config: DeepseekConfig, linears: Linears, path: str):
        hidden, heads = config.hidden_size, config.num_attention_heads
        rank, bias, dtype = config.kv_lora_rank, config.attention_bias, linears.dtype
        queries = heads * config.head_dim
        inner = config.q_lora_rank
        if inner is None:
            self.q_proj = linears.make(f"{path}.q_proj", queries, hidden, False)
            self.q_a_proj = self.q_a_layernorm = self.q_b_proj = None
        else:
            self.q_proj = None
            self.q_a_proj = linears.make(f"{path}.q_a_proj", inner, hidden, bias)
            self.q_a_layernorm = RMSNorm(inner, _EPS, dtype=dtype)
            self.q_b_proj = linears.make(f"{path}.q_b_proj", queries, inner, False)
        self.kv_a_proj_with_mqa = linears.make(
            f"{path}.kv_a_proj_with_mqa", rank + config.rotary_dim, hidden, bias
        )
        self.kv_a_layernorm = RMSNorm(rank, _EPS, dtype=dtype)
        self.k_b_proj = Dense(heads * config.qk_nope_head_dim, rank, use_bias=False, dtype=dtype)
        self.v_b_proj = Dense(heads * config.v_head_dim, rank, use_bias=False, dtype=dtype)
        self.o_proj = linears.make(f"{path}.o_proj", hidden, heads * config.v_head_dim, bias)
        self.heads, self.rank, self.rotated = heads, rank, config.rotary_dim
        self.scale, self.paired, self.dtype = config.score_scale, config.paired, dtype

    def make_cache(self, batch: int, slots: int) -> LatentCache:
        """An empty cache, zeros, with room for `slots` tokens of each row."""
        latent, key = (
            jnp.zeros((batch, slots, size), self.dtype) for size in (self.rank, self.rotated)
        )
        return LatentCache(latent, key)

    def list_words(self) -> tuple[jax.Array, ...]:
        """Packed words of the first products."""
        return list_words(self._first, self.kv_a_proj_with_mqa)

    @property
    def _first(self) -> Any:
        """What makes queries, or their latents."""
        return self.q_a_proj if self.q_proj is None else self.q_proj

    def __call__(
        self, x: jax.Array, piece: Piece, cache: LatentCache | None, onto: Onto
    ) -> tuple[Stream, LatentCache | None]:
        q, compressed = project(x, (self._first, self.kv_a_proj_with_mqa))
        if self.q_a_layernorm is not None and self.q_b_proj is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.reshape(*x.shape[:2], self.heads, -1)
        q, q_rotated = jnp.split(q, [q.shape[-1] - self.rotated], axis=-1)
        latent, key = jnp.split(compressed, [self.rank], axis=-1)
        assert piece.rotation is not None
        cos, sin = piece.rotation.cos, piece.rotation.sin
        q_rotated, key = (
            rotate(part, cos, sin, paired=self.paired) for part in (q_rotated, key[:, :, None])
        )
        held = self.kv_a_layernorm(latent), key[:, :, 0]
        if cache is not None:
            held = write_latents(cache, held, piece.start, piece.lengths)
        mixed = attend_latents(
            q,
            q_rotated,
            held,
            (self.k_b_proj.weight[...], self.v_b_proj.weight[...]),
            piece.start,
            piece.lengths,
            scale=self.scale,
            is_whole=cache is None,
        )
        stream = Stream(*project_onto(mixed, self.o_proj, onto))
        return stream, None if cache is None else LatentCache(*held)
