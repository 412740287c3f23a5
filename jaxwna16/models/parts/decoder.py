"""`Decoder`: what is around the layers of every family, and what it tells each of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
from flax import nnx

from jaxwna16.models.parts.attention import place_tokens
from jaxwna16.models.parts.layers import Embedding, Linears
from jaxwna16.models.parts.rope import rotation_tables

Array = jax.Array
Cache = tuple[Any, ...]
"""What each layer keeps of the tokens before: a `LayerCache` if it is attention."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rotation", "slots", "start", "lengths"),
    meta_fields=("window",),
)
@dataclasses.dataclass(frozen=True)
class Piece:
    """What a layer is told of the tokens.

    Attributes:
      rotation: cosines and sines of the positions, see `rotation_tables`.
      slots: int32 [B, S], where its keys and values go.
      start: int32 [B], how many tokens of each row come before.
      lengths: int32 [B], how many tokens of each row are no padding.
      window: how many tokens each attends to, itself included; None is all before it.
    """

    rotation: tuple[Array, Array]
    slots: Array
    start: Array
    lengths: Array
    window: int | None

    @property
    def seen(self) -> tuple[Array, Array, int | None]:
        """What decides which slots each token attends to; see `pallas_kernels.attention.attend`."""
        return self.start, self.lengths, self.window


class Decoder(nnx.Module):
    """Embedding, layers and the last norm: the checkpoint's `model.`.

    A family's subclass states the attributes below.

    Attributes:
      make_layer: called as `make_layer(config, linears, layer)`. Makes a module with
        `make_cache(batch, slots)` and `__call__(x, piece, cache)`, which returns x and the cache.
      make_norm: the class of the last norm.
      rope_dtype: dtype of cosines and sines; None is that of the stream.
    """

    make_layer: ClassVar[Callable[..., Any]]
    make_norm: ClassVar[Callable[..., Any]]
    rope_dtype: ClassVar[Any] = None

    def __init__(self, config: Any, linears: Linears):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=linears.dtype)
        self.layers = nnx.List(
            type(self).make_layer(config, linears, layer)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = type(self).make_norm(
            config.hidden_size, config.rms_norm_eps, dtype=linears.dtype
        )
        self.config = config

    def list_windows(self) -> Sequence[int | None]:
        """Per layer, how many tokens a query sees (itself included), or None for all before it."""
        return [None] * len(self.layers)

    def make_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for `slots` tokens of each row."""
        return tuple(layer.make_cache(batch, slots) for layer in self.layers)

    def __call__(
        self, tokens: Array, start: Array, count: Array, cache: Cache | None
    ) -> tuple[Array, Cache]:
        """As `CausalLM.hidden`; without a cache, a piece that is whole rows."""
        config = self.config
        places = place_tokens(start, count, tokens.shape[1])
        x = self.embed_tokens(tokens)
        rotation = rotation_tables(
            config.rope, config.rotary_dim, places.positions, self.rope_dtype or x.dtype
        )
        caches = []
        for i, (layer, window) in enumerate(zip(self.layers, self.list_windows(), strict=True)):
            piece = Piece(rotation, places.slots, start, count, window)
            before = None if cache is None else cache[i]
            x, after = run_layer(layer, x, piece, before)
            caches.append(after)
        return self.norm(x), tuple(caches)


@jax.jit
def run_layer(layer: Callable[..., Any], *arguments: Any) -> Any:
    """`layer(*arguments)`, so that layers of one shape are traced once and not once each."""
    return layer(*arguments)
