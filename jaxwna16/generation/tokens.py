"""Generating tokens: prompts in pieces, then a decode loop that stays on the device."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwna16.errors import InputError, NanWarning
from jaxwna16.generation.decoding import (
    NO_TOKEN,
    Options,
    Progress,
    Scores,
    decode,
    make_options,
    make_progress,
    prefill,
    round_up,
)
from jaxwna16.generation.pieces import choose_piece
from jaxwna16.generation.rope_border import Border
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.wrapped.media_tokens import list_media_faults
from jaxwna16.programs import Compilation, foresee, is_spread, refuse_fork

NAN = "nan"
"""The finish reason of a row whose logits are no distribution."""

Stream = Callable[[list[list[int]]], Mapping[int, int] | None]

STREAM_SECONDS = 0.1
"""About so much time passes between two calls of `stream`, unless one token takes longer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What came out, row by row, and what it took.

    Attributes:
      tokens: the generated tokens, without the prompt and without the stop token.
      finish_reasons: "stop" if a stop token (or `stream`) ended the row; "nan" if the logits for
        its next token were no distribution (one is NaN or +inf, or all are -inf); else "length".
      logprobs: the natural logarithm of each token's probability, or None if not asked for.
      top_logprobs: for each token, pairs (token, logarithm) of the n likeliest, likeliest first.
      prompt_tokens: of all prompts together.
      compile_seconds: tracing, and waiting for what is compiled; about 0 when these shapes ran
        before.
      prefill_seconds: running the prompts, up to the first token of each row. The first run of
        a program includes preparations of XLA (0.5 s for 30 layers on CPU), and shares a CPU with
        the compiling of the decode loop: measure a second one.
      decode_seconds: all tokens after the first, including the calls of `stream`.
      decoded_tokens: tokens computed in that time, stop tokens included.
    """

    tokens: list[list[int]]
    finish_reasons: list[str]
    logprobs: list[list[float]] | None
    top_logprobs: list[list[list[tuple[int, float]]]] | None
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

    @property
    def failures(self) -> list[str]:
        """Which rows ended with "nan", and at which step; one sentence each."""
        return [
            f"prompt {row}: after {len(self.tokens[row])} new tokens the logits are no "
            "distribution (one is NaN or +inf, or all are -inf): the row ends there"
            for row, reason in enumerate(self.finish_reasons)
            if reason == NAN
        ]


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
    logprobs: int | None = None,
    prefill_chunk: int | None = None,
    stream: Stream | None = None,
) -> GenerationResult:
    """Continue each prompt.

    Rows are independent: a row's logits do not depend on its neighbours, and with the same seed and
    the same place in the batch neither do its draws. Nor do they depend on `prefill_chunk` or
    `stream`, except that sums in another order round differently. A row whose logits are no
    distribution ends before that token, with the finish reason "nan" and a `NanWarning`; the others
    go on.

    Args:
      prompts: tokens of each: lists, or arrays of NumPy or JAX, also one array [B, S] for all.
      temperature: 0 is greedy.
      top_k: draw among the k most likely tokens; 0 is off.
      top_p: draw among the most likely tokens that together reach this probability; 1 is off.
      stop_tokens: tokens that end a row.
      logprobs: how many of the likeliest tokens to score beside the chosen one, or None for no
        scores. Scores are float32 log-probabilities of the model's own distribution, before
        temperature, top-k and top-p.
      prefill_chunk: tokens of each prompt that are run at once. None is up to 2048 on a GPU and up
        to 512 elsewhere, fewer in a wide batch or where a device has little free memory (see
        `jaxwna16.generation.pieces`), or the whole prompt where the model's rope asks for that.
      stream: called with the new tokens of each row, first with one each, as soon as the prompts
        have run (the decode loop may still be compiling), and then about every `STREAM_SECONDS`,
        or for every token where one takes longer. It may return {row: n}: these rows end, and n of
        their tokens are kept.

    Raises:
      InputError: listing everything wrong with the prompts and the options.
    """
    refuse_fork()
    stop_tokens, prompts = tuple(stop_tokens), _list_numbers(prompts)
    faults = [
        *_list_prompt_faults(model, prompts, max_new_tokens, prefill_chunk),
        *_list_option_faults(temperature, top_k, top_p, seed, stop_tokens),
        *_list_logprobs_faults(model, logprobs),
    ]
    if faults:
        raise InputError("cannot generate", faults)
    options = make_options(temperature, top_k, top_p, seed, stop_tokens)

    started = time.perf_counter()
    progress, prefill_seconds, compilation = start_rows(
        model, prompts, options, max_new_tokens, logprobs, prefill_chunk
    )
    ready = time.perf_counter()
    slots = round_up(max(map(len, prompts))) + round_up(max_new_tokens)
    border = Border(model, prompts, slots, prefill_chunk)
    progress, kept, waited = _finish_rows(
        model, progress, options, max_new_tokens, stream, compilation, border
    )
    finished = time.perf_counter()
    compilation.wait()
    waited_after = time.perf_counter() - finished

    generated, done, unsound = jax.device_get((progress.tokens, progress.done, progress.unsound))
    lengths = _measure_rows(generated, stop_tokens)
    for row, length in kept.items():
        lengths[row] = min(lengths[row], length)
    logprobs_of_rows, likeliest = _list_scores(progress.scores, lengths)
    # a row may have gone on, and even failed, behind the place where `stream` ended it
    stopped = np.isin(np.arange(len(done)), list(kept)) | (done & ~unsound)
    result = GenerationResult(
        tokens=_cut_rows(generated, lengths),
        finish_reasons=np.select([stopped, unsound], ["stop", NAN], "length").tolist(),
        logprobs=logprobs_of_rows,
        top_logprobs=likeliest,
        prompt_tokens=sum(map(len, prompts)),
        compile_seconds=ready - started - prefill_seconds + waited + waited_after,
        prefill_seconds=prefill_seconds,
        decode_seconds=finished - ready - waited,
        decoded_tokens=int((generated[:, 1:] != NO_TOKEN).sum()),
    )
    for failure in result.failures:
        warnings.warn(failure, NanWarning, stacklevel=2)
    return result


def start_rows(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    options: Options,
    max_new_tokens: int,
    logprobs: int | None = None,
    prefill_chunk: int | None = None,
) -> tuple[Progress, float, Compilation]:
    """Run the prompts and draw the first tokens, while the decode loop is still compiled.

    Also the seconds that takes once compiled, and what compiles the loop.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest, batch = int(lengths.max()), len(prompts)
    width = round_up(max_new_tokens)
    slots = round_up(longest) + width
    chunk = choose_piece(model, longest, batch, slots, prefill_chunk)
    tokens = np.zeros((batch, -(-longest // chunk) * chunk), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    progress = make_progress(
        model, jax.device_put(lengths), slots=slots, width=width, likeliest=logprobs
    )

    def cut_piece(begin: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        start = np.minimum(begin, lengths)
        count = np.minimum(lengths - start, chunk)
        return jax.device_put((tokens[:, begin : begin + chunk], start, count))

    compilation = Compilation()
    program = prefill.lower(model, *cut_piece(0), progress, options)
    compilation.start("prefill", program)
    if max_new_tokens > 1 and not is_spread(model):
        until = jax.ShapeDtypeStruct((), jnp.int32)
        begun = foresee(program, model)
        compilation.start("decode", decode.lower(model, begun, options, until))
    compilation.wait("prefill")

    started = time.perf_counter()
    for begin in range(0, longest, chunk):
        progress = prefill(model, *cut_piece(begin), progress, options)
    jax.block_until_ready(progress)
    return progress, time.perf_counter() - started, compilation


def _finish_rows(
    model: CausalLM,
    progress: Progress,
    options: Options,
    max_new_tokens: int,
    stream: Stream | None,
    compilation: Compilation,
    border: Border,
) -> tuple[Progress, dict[int, int], float]:
    """Generate until all rows are done.

    Also how many tokens are kept of those `stream` ended, and the seconds until the loop could run.
    """
    stops = tuple(jax.device_get(options.stop_tokens).tolist())
    kept: dict[int, int] = {}
    reported, steps, waited = 0, 1, 0.0
    while True:
        done, step = jax.device_get(progress.done), int(jax.device_get(progress.step))
        if stream is not None:
            new = jax.device_get(progress.tokens)[:, reported:step]
            ended = stream(_cut_rows(new, _measure_rows(new, stops))) or {}
            reported = step
            kept |= ended
            if ended:
                done = done | np.isin(np.arange(len(done)), list(ended))
                # an array of the device's, so that it is bound to it only where the others are
                progress = progress._replace(done=progress.done | jax.device_put(done))
        if done.all() or step >= max_new_tokens:
            return progress, kept, waited
        until = max_new_tokens if stream is None else min(step + steps, max_new_tokens)
        until, progress = border.cut(step, until), border.cross(model, progress, done)
        began = time.perf_counter()
        if step == 1:
            compilation.wait("decode")
            # no token yet, but XLA's preparations
            progress = jax.block_until_ready(decode(model, progress, options, _send(1)))
            waited = time.perf_counter() - began
            began += waited
        progress = jax.block_until_ready(decode(model, progress, options, _send(until)))
        seconds = (time.perf_counter() - began) / (jax.device_get(progress.step) - step)
        steps = max(1, int(STREAM_SECONDS / seconds))


def _send(number: int) -> jax.Array:
    return jax.device_put(np.int32(number))


def _measure_rows(tokens: np.ndarray, stop_tokens: tuple[int, ...]) -> np.ndarray:
    """How many tokens of each row are text: those before a stop token, or before `NO_TOKEN`."""
    ends = np.isin(tokens, [NO_TOKEN, *stop_tokens])
    return np.where(ends.any(axis=1), ends.argmax(axis=1), tokens.shape[1])


def _cut_rows(rows: np.ndarray, lengths: np.ndarray) -> list[list[Any]]:
    return [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]


def _list_scores(
    scores: Scores | None, lengths: np.ndarray
) -> tuple[list[list[float]] | None, list[list[list[tuple[int, float]]]] | None]:
    """Of each row the logarithms, and for each token the likeliest with theirs."""
    if scores is None:
        return None, None
    chosen, numbers, ids = (_cut_rows(x, lengths) for x in jax.device_get(scores))
    pairs = [
        [list(zip(*token, strict=True)) for token in zip(*row, strict=True)]
        for row in zip(ids, numbers, strict=True)
    ]
    return chosen, pairs


def _list_numbers(value: Any) -> Any:
    """Arrays as lists of Python's numbers, also those in lists; all else stays as it is."""
    if isinstance(value, jax.Array | np.ndarray):
        return jax.device_get(value).tolist()
    return list(map(_list_numbers, value)) if isinstance(value, list | tuple) else value


def _list_prompt_faults(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    prefill_chunk: int | None,
) -> Iterator[str]:
    vocab, limit = model.config.vocab_size, model.config.max_length
    reason = model.config.length_reason
    reason = f" ({reason})" if reason else ""
    if not _is_integer(max_new_tokens) or max_new_tokens < 1:
        yield f"max_new_tokens: expected an integer of at least 1, got {max_new_tokens!r}"
        max_new_tokens = 1
    if prefill_chunk is not None and not (_is_integer(prefill_chunk) and prefill_chunk > 0):
        yield f"prefill_chunk: expected an integer of at least 1, or None, got {prefill_chunk!r}"
        prefill_chunk = None
    if not _is_row(prompts) or not all(map(_is_row, prompts)):
        yield f"prompts: expected a list of tokens for each, [[1, 2], [3]], got {prompts!r:.60}"
        return
    if len(prompts) == 0:
        yield "prompts: expected at least one, got none"
    yield from list_media_faults(
        model.config, {f"prompt {i}": prompt for i, prompt in enumerate(prompts)}
    )
    longest = max(map(len, prompts), default=0)
    if model.config.whole_prompts and prefill_chunk is not None and prefill_chunk < longest:
        yield (
            f"prefill_chunk: {prefill_chunk} is less than a prompt of {longest} tokens, and with "
            "dynamic rope a prompt is one piece; leave it out"
        )
    for i, prompt in enumerate(prompts):
        strays = [t for t in prompt if not _is_integer(t) or not 0 <= t < vocab]
        if len(prompt) == 0:
            yield f"prompt {i}: empty, a model needs at least one token to continue"
        if strays:
            yield f"prompt {i}: expected tokens 0 .. {vocab - 1}, got {strays[0]!r}"
        if len(prompt) + max_new_tokens > limit:
            yield (
                f"prompt {i}: {len(prompt)} tokens and max_new_tokens = {max_new_tokens} are more "
                f"than the {limit} this model was made for{reason}"
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


def _list_logprobs_faults(model: CausalLM, logprobs: int | None) -> Iterator[str]:
    vocab = model.config.vocab_size
    if logprobs is not None and not (_is_integer(logprobs) and 0 <= logprobs <= vocab):
        yield f"logprobs: expected an integer from 0 to {vocab}, or None, got {logprobs!r}"


def _is_row(value: Any) -> bool:
    try:
        len(value)
    except TypeError:
        return False
    return not isinstance(value, str | Mapping)


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
