"""Generating tokens: one jitted prefill, then a decode loop that stays on the device."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxwna16.errors import InputError
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.sampling import sample

Array = jax.Array
Stream = Callable[[list[list[int]]], None]

STREAM_STEPS = 8
"""Tokens per row between two calls of `stream`."""

trace_counts: collections.Counter[str] = collections.Counter()
"""How often "prefill" and "decode" were traced in this process."""

_NO_TOKEN = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What came out, row by row, and what it took.

    Attributes:
      tokens: the generated tokens, without the prompt and without the stop token.
      finish_reasons: "stop" if a stop token ended the row, else "length".
      prompt_tokens: of all prompts together.
      compile_seconds: tracing and compiling; about 0 when these shapes ran before.
      prefill_seconds: running the prompts, up to the first token of each row. The first run of
        a program includes preparations of XLA (0.5 s for 30 layers on CPU): measure a second one.
      decode_seconds: all tokens after the first, including the calls of `stream`.
      decoded_tokens: tokens computed in that time, stop tokens included.
    """

    tokens: list[list[int]]
    finish_reasons: list[str]
    prompt_tokens: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    decoded_tokens: int

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """0.0 if every row ended with its first token."""
        return self.decoded_tokens / self.decode_seconds if self.decoded_tokens else 0.0


class _Options(NamedTuple):
    """What steers the choice of tokens; all arrays, so nothing here is traced anew."""

    key: Array
    temperature: Array
    top_k: Array
    top_p: Array
    stop_tokens: Array


class _Progress(NamedTuple):
    """State of the decode loop.

    Attributes:
      step: int32, tokens generated per row so far; column `step - 1` of `tokens` is the newest.
      tokens: int32 [B, max_new_tokens rounded up], -1 where nothing was generated.
      lengths: int32 [B], tokens of each prompt.
      done: bool [B], whether the row hit a stop token.
    """

    step: Array
    tokens: Array
    lengths: Array
    done: Array
    cache: Any


def generate_tokens(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    stream: Stream | None = None,
) -> GenerationResult:
    """Continue each prompt.

    Rows are independent: a row's logits do not depend on its neighbours, and with the same seed and
    the same place in the batch neither do its draws.

    Args:
      temperature: 0 is greedy.
      top_k: draw among the k most likely tokens; 0 is off.
      top_p: draw among the most likely tokens that together reach this probability; 1 is off.
      stop_tokens: tokens that end a row.
      stream: called about every `STREAM_STEPS` tokens with the new tokens of each row.

    Raises:
      InputError: listing everything wrong with the prompts and the options.
    """
    stop_tokens = tuple(stop_tokens)
    faults = [
        *_list_prompt_faults(model, prompts, max_new_tokens),
        *_list_option_faults(temperature, top_k, top_p, seed, stop_tokens),
    ]
    if faults:
        raise InputError("cannot generate", faults)
    options = _make_options(temperature, top_k, top_p, seed, stop_tokens)
    tokens, lengths = _pad_prompts(prompts)
    width = round_up(max_new_tokens)

    started = time.perf_counter()
    prefill = functools.partial(_prefill, model, tokens, lengths, options, width=width)
    _prefill.lower(*prefill.args, **prefill.keywords).compile()
    prefill_started = time.perf_counter()
    progress = jax.block_until_ready(prefill())
    prefilled = time.perf_counter()
    progress = jax.block_until_ready(_decode(model, progress, options, jnp.int32(1)))
    ready = time.perf_counter()

    reported = 0
    while True:
        done, step = np.asarray(progress.done), int(progress.step)
        if stream is not None:
            stream(_cut_rows(np.asarray(progress.tokens)[:, reported:step], stop_tokens))
            reported = step
        if done.all() or step >= max_new_tokens:
            break
        until = max_new_tokens if stream is None else min(step + STREAM_STEPS, max_new_tokens)
        progress = _decode(model, progress, options, jnp.int32(until))
    finished = time.perf_counter()

    generated = np.asarray(progress.tokens)
    return GenerationResult(
        tokens=_cut_rows(generated, stop_tokens),
        finish_reasons=["stop" if row else "length" for row in done],
        prompt_tokens=sum(map(len, prompts)),
        compile_seconds=(prefill_started - started) + (ready - prefilled),
        prefill_seconds=prefilled - prefill_started,
        decode_seconds=finished - ready,
        decoded_tokens=int((generated[:, 1:] != _NO_TOKEN).sum()),
    )


def round_up(length: int) -> int:
    """The next of 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, …: few shapes, at most 1/4 wasted."""
    unit = max(16, (1 << (length - 1).bit_length()) >> 3)
    return -(-length // unit) * unit


@functools.partial(jax.jit, static_argnames="width")
def _prefill(
    model: CausalLM, tokens: Array, lengths: Array, options: _Options, *, width: int
) -> _Progress:
    """Run padded prompts int32 [B, S], choose the first tokens, make room for `width` of them."""
    trace_counts["prefill"] += 1
    batch, steps = tokens.shape
    cache = model.make_cache(batch, steps + width)
    hidden, cache = model.hidden(tokens, jnp.zeros_like(lengths), lengths, cache)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    progress = _Progress(
        step=jnp.int32(0),
        tokens=jnp.full((batch, width), _NO_TOKEN, jnp.int32),
        lengths=lengths,
        done=jnp.zeros(batch, bool),
        cache=cache,
    )
    return _add_tokens(progress, model.logits(last[:, 0]), options)


@functools.partial(jax.jit, donate_argnames="progress")
def _decode(model: CausalLM, progress: _Progress, options: _Options, until: Array) -> _Progress:
    """Generate until each row has `until` tokens, an int32 array, or all rows are done."""
    trace_counts["decode"] += 1

    def advance(progress: _Progress) -> _Progress:
        newest = lax.dynamic_slice_in_dim(progress.tokens, progress.step - 1, 1, axis=1)
        start, count = progress.lengths + progress.step - 1, (~progress.done).astype(jnp.int32)
        hidden, cache = model.hidden(jnp.maximum(newest, 0), start, count, progress.cache)
        return _add_tokens(progress._replace(cache=cache), model.logits(hidden[:, 0]), options)

    return lax.while_loop(
        lambda progress: (progress.step < until) & ~progress.done.all(), advance, progress
    )


def _add_tokens(progress: _Progress, logits: Array, options: _Options) -> _Progress:
    """Choose the next token of every row that is not done, from logits [B, V]."""
    step_key = jax.random.fold_in(options.key, progress.step)
    drawn = sample(logits, step_key, options.temperature, options.top_k, options.top_p)
    chosen = jnp.where(progress.done, _NO_TOKEN, drawn)
    stops = (chosen[:, None] == options.stop_tokens[None, :]).any(axis=1)
    tokens = lax.dynamic_update_slice_in_dim(
        progress.tokens, chosen[:, None], progress.step, axis=1
    )
    return progress._replace(step=progress.step + 1, tokens=tokens, done=progress.done | stops)


def _make_options(
    temperature: float, top_k: int, top_p: float, seed: int, stop_tokens: tuple[int, ...]
) -> _Options:
    # Rounded up in number, so that another number of stop tokens is not another program.
    stops = np.full(round_up(max(len(stop_tokens), 1)), _NO_TOKEN - 1, np.int32)
    stops[: len(stop_tokens)] = stop_tokens
    return _Options(
        key=jax.random.key(seed),
        temperature=jnp.float32(temperature),
        top_k=jnp.int32(top_k),
        top_p=jnp.float32(top_p),
        stop_tokens=jnp.asarray(stops),
    )


def _pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Prompts padded on the right, int32 [B, S], and their lengths, int32 [B]."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), round_up(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths)


def _cut_rows(tokens: np.ndarray, stop_tokens: tuple[int, ...]) -> list[list[int]]:
    """Each row without what is not text: stop tokens and the -1 of rows that were done before."""
    return [[int(t) for t in row if t != _NO_TOKEN and t not in stop_tokens] for row in tokens]


def _list_prompt_faults(
    model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Iterator[str]:
    vocab, limit = model.config.vocab_size, model.config.max_length
    if not _is_integer(max_new_tokens) or max_new_tokens < 1:
        yield f"max_new_tokens: expected an integer of at least 1, got {max_new_tokens!r}"
        max_new_tokens = 1
    if len(prompts) == 0:
        yield "prompts: expected at least one, got none"
    for i, prompt in enumerate(prompts):
        strays = [t for t in prompt if not _is_integer(t) or not 0 <= t < vocab]
        if len(prompt) == 0:
            yield f"prompt {i}: empty, a model needs at least one token to continue"
        if strays:
            yield f"prompt {i}: expected tokens 0 .. {vocab - 1}, got {strays[0]!r}"
        if len(prompt) + max_new_tokens > limit:
            yield (
                f"prompt {i}: {len(prompt)} tokens and max_new_tokens = {max_new_tokens} are more "
                f"than the {limit} this model was made for"
            )


def _list_option_faults(
    temperature: float, top_k: int, top_p: float, seed: int, stop_tokens: tuple[int, ...]
) -> Iterator[str]:
    if not (_is_number(temperature) and 0 <= temperature < math.inf):
        yield f"temperature: expected a number of at least 0, got {temperature!r}"
    if not (_is_integer(top_k) and 0 <= top_k < 2**31):
        yield f"top_k: expected an integer of at least 0 (off), got {top_k!r}"
    if not (_is_number(top_p) and 0 < top_p <= 1):
        yield f"top_p: expected a number above 0 and at most 1 (off), got {top_p!r}"
    if not (_is_integer(seed) and 0 <= seed < 2**32):
        yield f"seed: expected an integer from 0 to 2^32 - 1, got {seed!r}"
    for token in stop_tokens:
        if not (_is_integer(token) and 0 <= token < 2**31):
            yield f"stop_tokens: expected tokens, got {token!r}"


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
