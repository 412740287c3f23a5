"""`Decoder`: what is around the layers of every family, and what it tells each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx

from jaxwna16.models.parts.attention import LayerCache, place_tokens, see_slots
from jaxwna16.models.parts.layers import Embedding, Linears
from jaxwna16.models.parts.rope import rotation_tables

Array = jax.Array
Cache = tuple[Any, ...]
"""What each layer keeps of the tokens before: a `LayerCache` if it is attention."""


class Piece(NamedTuple):
    """What a layer is told of the tokens.

    Attributes:
      rotation: cosines and sines of the positions, see `rotation_tables`.
      seen: bool [B, S, slots], which slots each token attends to.
      slots: int32 [B, S], where its keys and values go.
      lengths: int32 [B], how many tokens of each row are no padding.
    """

    rotation: tuple[Array, Array]
    seen: Array
    slots: Array
    lengths: Array


class Stream(NamedTuple):
    """What goes from layer to layer, [B, S, hidden] both.

    Attributes:
      x: the residual stream.
      normalised: its norm, which the next layer (or the head) takes; None if that takes x itself.
    """

    x: Array
    normalised: Array | None = None

    @property
    def taken(self) -> Array:
        """What the next product takes."""
        return self.x if self.normalised is None else self.normalised


class Decoder(nnx.Module):
    """Embedding, layers and the last norm: the checkpoint's `model.`.

    A family's subclass states the attributes below.

    Attributes:
      make_layer: called as `make_layer(config, linears, layer)`. Makes a module with
        `make_cache(batch, slots)` and `__call__(stream, piece, cache, following)`, which returns
        the `Stream` and the cache. `following` is the norm of the stream that comes after the
        layer: `input_layernorm` of the next, if layers have it, and in the end the last norm. So
        the layer's last product, its sum with the stream and that norm are one operation.
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
        config, steps = self.config, tokens.shape[1]
        places = place_tokens(start, count, steps)
        slots = steps if cache is None else _count_slots(cache)
        x = self.embed_tokens(tokens)
        rotation = rotation_tables(
            config.rope, config.rotary_dim, places.positions, self.rope_dtype or x.dtype
        )
        windows = self.list_windows()
        pieces = {
            window: Piece(rotation, see_slots(places.positions, slots, window), places.slots, count)
            for window in set(windows)
        }
        first, *others = (getattr(layer, "input_layernorm", None) for layer in self.layers)
        stream = Stream(x, None if first is None else first(x))
        caches = []
        for i, following in enumerate((*others, self.norm)):
            before = None if cache is None else cache[i]
            norm = None if following is None else following.norm
            stream, after = run_layer(self.layers[i], stream, pieces[windows[i]], before, norm)
            caches.append(after)
        return stream.normalised, tuple(caches)


@jax.jit
def run_layer(layer: Callable[..., Any], *arguments: Any) -> Any:
    """`layer(*arguments)`, so that layers of one shape are traced once and not once each."""
    return layer(*arguments)


def _count_slots(cache: Cache) -> int:
    return next((layer.slots for layer in cache if isinstance(layer, LayerCache)), 0)
