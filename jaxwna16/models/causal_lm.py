"""`CausalLM`: what the language models of all families have in common around their decoder."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from jaxwna16.errors import InputError
from jaxwna16.models.config.language_config import LanguageConfig
from jaxwna16.models.parts.decoder import Decoder
from jaxwna16.models.parts.layers import Dense, Linears, multiply
from jaxwna16.programs import refuse_fork
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.formulas.activations import cap
from pallas_kernels.formulas.norms import apply_factor

Array = jax.Array
T = TypeVar("T")


class Beside(Generic[T]):
    """An attribute stored outside its object, so that NNX does not see it as a part of the graph.

    Objects are told apart by identity. What is made from one, even a copy, has the default.
    """

    def __init__(self, default: T):
        self._default = default
        self._values: weakref.WeakKeyDictionary[object, T] = weakref.WeakKeyDictionary()

    def __get__(self, owner: object, kind: type | None = None) -> T:
        return self._values.get(owner, self._default)

    def __set__(self, owner: object, value: T) -> None:
        self._values[owner] = value


class CausalLM(nnx.Module):
    """A language model: `model(tokens)` maps int32 [B, S] to float32 logits [B, S, V].

    `hidden_states(tokens)` is what the head would take, for models that embed texts.

    Constructed under `nnx.eval_shape` it holds shapes and no arrays; `fill_model` fills it. It is
    a pytree, so `jax.jit` takes it as an argument. Attribute paths are the checkpoint's own tensor
    names, except those that the family's name map changes (`jaxwna16.models.families`).

    Attributes:
      config: what it was constructed from.
      has_head: whether it makes logits; if not, `hidden_states` alone.
      dtype: dtype of activations, cache and plain weights. In float32 products are full float32.
      backend: of quantized linears and attention, as given.
      folder: the checkpoint folder it was loaded from, if any: where its tokenizer is. Neither it
        nor `warnings` is a part of the pytree, so that models of one architecture share programs.
        So what `nnx.merge`, `jax.device_put` or a jitted function makes of a model has neither,
        until it is given them.
      follow_links: whether files of it are read also where they are links that leave it.
      warnings: remarks about that checkpoint, including what was left out by rule.

    Args:
      decoder: makes the decoder of a configuration.
      specs: module path ("lm_head", "model.layers.0.mlp.up_proj") -> spec of its packed weight. Of
        experts, `w13` (gate and up) and `w2` are such modules: "model.layers.0.mlp.experts.w13".
        Modules that are not linear layers (embeddings, routers) hold floats even if they have a
        spec. So do experts if one of their two products has none.
      reordered: paths of those whose input features were reordered (act-order).
      has_head: see the attribute.
      dtype: see the attribute.
      backend: of the quantized linears and of attention; None is the best available, "triton" or
        "xla" forces one.

    Raises:
      ModelError: listing specs that no module has, or that contradict the linear's shape.
    """

    folder = Beside[str | None](None)
    follow_links = Beside[bool](False)
    warnings = Beside[tuple[str, ...]](())

    def __init__(
        self,
        decoder: Callable[[Any, Linears], Decoder],
        config: LanguageConfig,
        specs: Mapping[str, QuantSpec] | None = None,
        *,
        dtype: jax.typing.DTypeLike,
        backend: str | None = None,
        reordered: Collection[str] = (),
        has_head: bool = True,
    ):
        self.config, self.has_head = config, has_head
        self.dtype, self.backend = jnp.dtype(dtype), backend
        # NNX keeps every name that was ever set in the graph, so all models must set the same
        self.folder, self.follow_links, self.warnings = None, False, ()
        linears = Linears(specs or {}, self.dtype, backend, reordered)
        self.model = decoder(config, linears)
        hidden = self.model.embed_tokens.features
        self.lm_head = (
            None
            if config.tie_word_embeddings or not has_head
            else linears.make("lm_head", config.vocab_size, hidden, False)
        )
        linears.check_all_used(self)

    def __call__(self, tokens: ArrayLike, lengths: Array | None = None) -> Array:
        """Logits for each token; one outside the vocabulary gives NaN.

        Args:
          tokens: integers [B, S], at least one; an array of JAX or NumPy, or lists.
          lengths: int32 [B], how many tokens of each row are no padding at its end; None is all.

        Raises:
          InputError: if they are something else; if the model has no head; or in a process that is
            a fork of one with a checkpoint.
        """
        return self.logits(self.hidden_states(tokens, lengths))

    def hidden_states(self, tokens: ArrayLike, lengths: Array | None = None) -> Array:
        """The normalised stream [B, S, hidden] of each token in the model's dtype.

        A token's depends on the tokens before it alone. So rows of several lengths can be filled up
        at their ends with any token; where rope depends on the length of a row (dynamic, longrope),
        `lengths` must tell what is filled up. A model that embeds texts takes the stream of the
        last token.

        Args:
          tokens, lengths: as of a call.

        Raises:
          InputError: if they are something else; or in a process that is a fork of one with a
            checkpoint.
        """
        refuse_fork()
        tokens = _read_tokens(tokens, self.config.vocab_size)
        batch, steps = tokens.shape
        start = jnp.zeros(batch, jnp.int32)
        count = jnp.full(batch, steps, jnp.int32) if lengths is None else lengths
        hidden, _ = self.model(tokens, start, count, None)
        return hidden

    def make_cache(self, batch: int, slots: int) -> Any:
        """An empty cache for `slots` tokens of each row, in the model's dtype."""
        return self.model.make_cache(batch, slots)

    def hidden(
        self, tokens: Array, start: Array, count: Array, cache: Any, length: Array | None = None
    ) -> tuple[Array, Any]:
        """Run the layers over a piece of each row. Pieces after each other are one long piece.

        Args:
          tokens: int32 [B, S]. Those from `count` on are padding: nothing of them is kept, and
            what comes out of them means nothing.
          start: int32 [B], how many tokens of each row came before the piece.
          count: int32 [B], how many tokens of each row are in it, from 0 to S.
          cache: of the tokens before. Its slots must suffice for start + count.
          length: int32 [B], tokens of each row, of which the piece is a part, where rope depends on
            it (Phi-3's longrope); None is start + count.

        Returns:
          The normalised stream [B, S, hidden] in the model's dtype, and the cache with the piece
          added.
        """
        return self.model(tokens, start, count, cache, length)

    def logits(self, hidden: Array) -> Array:
        """Float32 logits [..., V] of the normalised stream [..., hidden].

        Raises:
          InputError: if the model has no head.
        """
        if not self.has_head:
            raise InputError(
                "this checkpoint has no head (lm_head), so the model makes no logits and no text: "
                "model.hidden_states(tokens) gives the normalised stream of each token"
            )
        logits = apply_factor(self._run_head(hidden), self.config.logit_scale)
        return cap(logits, self.config.final_softcap)

    def _run_head(self, hidden: Array) -> Array:
        if self.lm_head is None:
            return multiply(hidden, self.model.embed_tokens.weight[...])
        if isinstance(self.lm_head, Dense):
            return multiply(hidden, self.lm_head.weight[...])
        return self.lm_head(hidden).astype(jnp.float32)


def _read_tokens(value: Any, vocab_size: int) -> Array:
    """Tokens as int32 [B, S]; what is outside the vocabulary stays outside, however wide it is."""
    try:
        tokens = value if isinstance(value, Array) else np.asarray(value)
    except (TypeError, ValueError) as error:  # rows of several lengths above all
        raise InputError(f"tokens: expected integers [B, S], got {value!r:.60}") from error
    if tokens.ndim != 2:
        found = f"shape {tokens.shape}" if tokens.ndim else repr(value)[:60]
        way_out = "; one row is [[1, 2, 3]]" if tokens.ndim == 1 else ""
        raise InputError(f"tokens: expected integers [B, S], got {found}{way_out}")
    if 0 in tokens.shape:
        raise InputError(f"tokens: expected at least one in each row, got shape {tokens.shape}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(f"tokens: expected integers [B, S], got {tokens.dtype} {tokens.shape}")
    if tokens.dtype.itemsize >= 4 and tokens.dtype != jnp.int32:
        least = -1 if jnp.issubdtype(tokens.dtype, jnp.signedinteger) else 0
        tokens = tokens.clip(least, vocab_size)
    return jnp.asarray(tokens, jnp.int32)
