"""The jitted programs of generation: a piece of the prompts, and the decode loop.

A model's cache is a pytree of any structure, which goes from one call to the next.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxwna16.generation.sampling import sample
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.programs import trace_counts

Array = jax.Array

NO_TOKEN = -1
"""What stands in `Progress.tokens` where nothing was generated."""


class Options(NamedTuple):
    """Options of sampling, as arrays: other values do not trace the programs anew."""

    key: Array
    temperature: Array
    top_k: Array
    top_p: Array
    stop_tokens: Array


class Scores(NamedTuple):
    """Log-probabilities, float32, of T tokens a row, and of the n likeliest in place of each.

    They are of the model's own distribution, before the options change it.

    Attributes:
      chosen: [B, T].
      likeliest, ids: [B, T, n], the largest first, and int32 tokens.
    """

    chosen: Array
    likeliest: Array
    ids: Array


class Progress(NamedTuple):
    """State of generation, from the first piece of the prompts to the last token.

    Attributes:
      step: int32, tokens generated per row so far; column `step - 1` of `tokens` is the newest.
      tokens: int32 [B, T], `NO_TOKEN` where nothing was generated.
      scores: as `tokens`, or None.
      lengths: int32 [B], tokens of each prompt.
      done: bool [B], whether the row has ended: it is neither computed with nor added to.
      unsound: bool [B], whether it ended because its logits were no distribution.
      hidden: [B, H], the stream of each prompt's last token so far.
    """

    step: Array
    tokens: Array
    scores: Scores | None
    lengths: Array
    done: Array
    unsound: Array
    hidden: Array
    cache: Any


def make_options(
    temperature: float, top_k: int, top_p: float, seed: int, stop_tokens: Sequence[int]
) -> Options:
    # Rounded up in number, so that another number of stop tokens is not another program.
    stops = np.full(round_up(max(len(stop_tokens), 1)), NO_TOKEN - 1, np.int32)
    stops[: len(stop_tokens)] = stop_tokens
    numbers = np.uint32(seed), np.float32(temperature), np.int32(top_k), np.float32(top_p)
    seed_array, *others = jax.device_put((*numbers, stops))
    return Options(_make_key(seed_array), *others)


_make_key = jax.jit(jax.random.key)


def round_up(length: int) -> int:
    """The next of 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, …: few shapes, at most 1/4 wasted."""
    unit = max(16, (1 << (length - 1).bit_length()) >> 3)
    return -(-length // unit) * unit


@functools.partial(jax.jit, static_argnames=("slots", "width", "likeliest"))
def make_progress(
    model: CausalLM, lengths: Array, *, slots: int, width: int, likeliest: int | None
) -> Progress:
    """What there is before the prompts run.

    Under `jit`, since zeros made one by one would be implicit transfers to the device.

    Args:
      lengths: int32 [B], tokens of each prompt.
      slots: of the cache.
      width: T, room for that many new tokens.
      likeliest: n of `Scores`; None is without scores.
    """
    batch, scores = len(lengths), None
    if likeliest is not None:
        scores = Scores(
            chosen=jnp.zeros((batch, width), jnp.float32),
            likeliest=jnp.zeros((batch, width, likeliest), jnp.float32),
            ids=jnp.zeros((batch, width, likeliest), jnp.int32),
        )
    return Progress(
        step=jnp.int32(0),
        tokens=jnp.full((batch, width), NO_TOKEN, jnp.int32),
        scores=scores,
        lengths=lengths,
        done=jnp.zeros(batch, bool),
        unsound=jnp.zeros(batch, bool),
        hidden=jnp.zeros((batch, model.config.hidden_size), model.dtype),
        cache=model.make_cache(batch, slots),
    )


@functools.partial(jax.jit, donate_argnames="progress")
def prefill(
    model: CausalLM,
    tokens: Array,
    start: Array,
    count: Array,
    progress: Progress,
    options: Options,
) -> Progress:
    """Run a piece int32 [B, S] of the prompts; `start` and `count` as `hidden` of the model.

    The last piece draws the first token of every row. So it comes while the decode loop, which
    takes longest to compile, may still be compiled.
    """
    trace_counts["prefill"] += 1
    stream, cache = model.hidden(tokens, start, count, progress.cache, progress.lengths)
    last = jnp.maximum(count - 1, 0)[:, None, None]
    newest = jnp.take_along_axis(stream, last, axis=1)[:, 0]
    hidden = jnp.where(count[:, None] > 0, newest, progress.hidden)
    drawn = lax.cond(
        (start + count == progress.lengths).all(),
        lambda progress: _add_tokens(progress, model.logits(progress.hidden), options),
        lambda progress: progress,
        progress._replace(hidden=hidden, cache=None),  # through a branch, a cache would be copied
    )
    return drawn._replace(cache=cache)


@functools.partial(jax.jit, donate_argnames="progress")
def renew(
    model: CausalLM, tokens: Array, start: Array, count: Array, length: Array, progress: Progress
) -> Progress:
    """Run a piece of rows anew, as parts of rows of `length` int32 [B] tokens: the cache alone."""
    trace_counts["renew"] += 1
    _, cache = model.hidden(tokens, start, count, progress.cache, length)
    return progress._replace(cache=cache)


@functools.partial(jax.jit, donate_argnames="progress")
def decode(model: CausalLM, progress: Progress, options: Options, until: Array) -> Progress:
    """Generate until each row has `until` tokens, an int32 array, or all rows are done."""
    trace_counts["decode"] += 1

    def advance(progress: Progress) -> Progress:
        newest = lax.dynamic_slice_in_dim(progress.tokens, progress.step - 1, 1, axis=1)
        start, count = progress.lengths + progress.step - 1, (~progress.done).astype(jnp.int32)
        hidden, cache = model.hidden(jnp.maximum(newest, 0), start, count, progress.cache)
        return _add_tokens(progress._replace(cache=cache), model.logits(hidden[:, 0]), options)

    return lax.while_loop(
        lambda progress: (progress.step < until) & ~progress.done.all(), advance, progress
    )


def _add_tokens(progress: Progress, logits: Array, options: Options) -> Progress:
    """Choose the next token of every row that is not done, from logits [B, V].

    A row whose logits are no distribution gets none, and ends.
    """
    step = progress.step
    step_key = jax.random.fold_in(options.key, step)
    drawn, sound = sample(logits, step_key, options.temperature, options.top_k, options.top_p)
    unsound = ~(progress.done | sound)
    chosen = jnp.where(progress.done | unsound, NO_TOKEN, drawn)
    stops = (chosen[:, None] == options.stop_tokens[None, :]).any(axis=1)
    scores = progress.scores
    if scores is not None:
        new = _score(logits, drawn, scores.ids.shape[-1])
        scores = Scores(*(_put(old, x, step) for old, x in zip(scores, new, strict=True)))
    return progress._replace(
        step=step + 1,
        tokens=_put(progress.tokens, chosen, step),
        scores=scores,
        done=progress.done | stops | unsound,
        unsound=progress.unsound | unsound,
    )


def _score(logits: Array, chosen: Array, likeliest: int) -> Scores:
    logits = jax.nn.log_softmax(logits, axis=-1)
    best, ids = lax.top_k(logits, likeliest)
    return Scores(jnp.take_along_axis(logits, chosen[:, None], axis=1)[:, 0], best, ids)


def _put(columns: Array, column: Array, step: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(columns, column[:, None], step, axis=1)
