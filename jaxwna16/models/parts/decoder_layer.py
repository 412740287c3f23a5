"""`Layer`: what the decoder layers of all families do, whatever mixes tokens and what follows."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxwna16.models.parts.piece import Following, Piece, Stream
from pallas_kernels.formulas.norms import Norm, Onto

Array = jax.Array


class Norms(NamedTuple):
    """The norms of a layer from its mixer on; None is none.

    Attributes:
      mixed: of what the mixer gives, before it is added to the stream.
      mlp: of what the MLP takes.
      added: of what the MLP gives, before it is added.
    """

    mixed: Norm | None = None
    mlp: Norm | None = None
    added: Norm | None = None


class Layer(nnx.Module):
    """What carries tokens over to other tokens, then an MLP or experts, each added to the stream.

    A family's subclass makes `self_attn` (or states `mixer`), `mlp`, and norms: `input_layernorm`
    and `post_attention_layernorm` are of what each of the two takes. Where norms are elsewhere, it
    states them in `find_norms`.

    Attributes:
      residual_multiplier: of what each of the two adds.
    """

    self_attn: Any
    mlp: Any
    post_attention_layernorm: Any
    residual_multiplier: float = 1.0

    @property
    def mixer(self) -> Any:
        """What carries tokens over to other tokens."""
        return self.self_attn

    def make_cache(self, batch: int, slots: int) -> Any:
        """What the layer keeps of `slots` tokens of each row, empty."""
        return self.mixer.make_cache(batch, slots)

    def find_norms(self) -> Norms:
        """The norms from the mixer on. What comes before, `input_layernorm`, the decoder runs."""
        return Norms(mlp=self.post_attention_layernorm.norm)

    def __call__(
        self, stream: Stream, piece: Piece, cache: Any, following: Following
    ) -> tuple[Stream, Any]:
        """The stream [B, S, hidden] behind the layer, and the cache with the piece."""
        norms, factor, words = self.find_norms(), self.residual_multiplier, self.mlp.list_words()
        onto = Onto(stream.x, norms.mixed, norms.mlp, words, factor)
        stream, cache = self.mixer(stream.taken, piece, cache, onto)
        onto = Onto(stream.x, norms.added, following.norm, following.ahead, factor)
        return Stream(*self.mlp.run_onto(stream.taken, onto)), cache
