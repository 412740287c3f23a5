"""`Decoder`: what is around the layers of every family, and what it tells each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from jaxwna16.models.config.rope_config import RopeConfig
from jaxwna16.models.parts.layers import Embedding, Linears
from jaxwna16.models.parts.piece import Following, Piece, Stream, find_positions
from jaxwna16.models.parts.rope import make_rotation
from pallas_kernels.formulas.rotation import Rotation
from pallas_kernels.tiles.ahead import choose_ahead
from pallas_kernels.tiles.device import find_device

Array = jax.Array
Cache = tuple[Any, ...]
"""What each layer keeps of the tokens before: a `LayerCache` if it is attention."""


class Decoder(nnx.Module):
    """Embedding, layers and the last norm: the checkpoint's `model.`.

    A family's subclass states the attributes below.

    Attributes:
      make_layer: called as `make_layer(config, linears, layer)`. Makes a module with
        `make_cache(batch, slots)` and `__call__(stream, piece, cache, following)`, which returns
        the `Stream` and the cache. `following` has the norm of the stream that comes after the
        layer: `input_layernorm` of the next, if layers have it, and in the end the last norm. So
        the layer's last product, its sum with the stream and that norm are one operation. `mixer`
        of the layer is its first part, whose `list_words()` are read ahead.
      make_norm: the class of the last norm.
      rope_dtype: dtype of cosines and sines; None is that of the stream.
      rounds_multiplier: whether the multiplier of the embedding is rounded to the model's dtype.
    """

    make_layer: ClassVar[Callable[..., Any]]
    make_norm: ClassVar[Callable[..., Any]]
    rope_dtype: ClassVar[Any] = None
    rounds_multiplier: ClassVar[bool] = False

    def __init__(self, config: Any, linears: Linears):
        multiplier = config.embedding_multiplier
        if self.rounds_multiplier:
            multiplier = float(np.asarray(multiplier, linears.dtype))
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            dtype=linears.dtype,
            multiplier=multiplier,
        )
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

    def list_ropes(self) -> Sequence[RopeConfig | None]:
        """Per layer, the rope that turns its heads, or None where nothing does."""
        return [self.config.rope] * len(self.layers)

    def make_rotation(
        self, rope: RopeConfig, positions: Array, dtype: Any, lengths: Array
    ) -> Rotation:
        """Of tokens at positions [B, S] of rows of `lengths` [B], in a stream of `dtype`."""
        size, tables = rope.span or self.config.rotary_dim, self.rope_dtype
        return make_rotation(rope, size, positions, dtype, tables, lengths)

    def list_beside(self, tokens: Array, x: Array) -> Sequence[Array | None]:
        """Per layer, what it takes of tokens [B, S] beside the stream, of their embedding x."""
        del tokens, x
        return [None] * len(self.layers)

    def find_before(self, layer: int, cache: Cache | None, so_far: Sequence[Any], x: Array) -> Any:
        """What a layer is given of the tokens before, `so_far` what those before it gave back."""
        del so_far, x
        return None if cache is None else cache[layer]

    def make_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for `slots` tokens of each row."""
        return tuple(layer.make_cache(batch, slots) for layer in self.layers)

    def __call__(
        self,
        tokens: Array,
        start: Array,
        count: Array,
        cache: Cache | None,
        length: Array | None = None,
    ) -> tuple[Array, Cache]:
        """As `CausalLM.hidden`; without a cache, a piece that is whole rows."""
        positions = find_positions(start, count, tokens.shape[1])
        x = self.embed_tokens(tokens)
        ropes = self.list_ropes()
        length = start + count if length is None else length
        # one each: layers that share a rope share its tables, too
        rotations = {
            rope: self.make_rotation(rope, positions, x.dtype, length)
            for rope in dict.fromkeys(ropes)
            if rope is not None
        }
        first = getattr(self.layers[0], "input_layernorm", None)
        stream = Stream(x, None if first is None else first(x))
        beside = self.list_beside(tokens, x)
        caches: list[Any] = []
        for i, (window, rope) in enumerate(zip(self.list_windows(), ropes, strict=True)):
            rotation = None if rope is None else rotations[rope]
            piece = Piece(rotation, start, count, window, beside[i])
            before = self.find_before(i, cache, caches, x)
            following = self._find_following(i)
            stream, after = run_layer(self.layers[i], stream, piece, before, following)
            caches.append(after)
        return stream.taken, tuple(caches)

    def _find_following(self, layer: int) -> Following:
        if layer + 1 == len(self.layers):
            return Following(self.norm.norm)
        after = self.layers[layer + 1]
        norm = getattr(after, "input_layernorm", None)
        ahead = after.mixer.list_words() if choose_ahead(find_device()) else ()
        return Following(None if norm is None else norm.norm, ahead)


@jax.jit
def run_layer(layer: Callable[..., Any], *arguments: Any) -> Any:
    """`layer(*arguments)`, so that layers of one shape are traced once and not once each."""
    return layer(*arguments)
