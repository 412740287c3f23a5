"""Log-likelihoods of continuations: requests that share what the model reads are scored as one."""

from __future__ import annotations

import functools
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxwna16.errors import InputError, ModelError
from jaxwna16.evaluation.lm_eval.batches import BatchSize, next_power
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.programs import trace_counts

Scored = tuple[float, bool]
Request = tuple[tuple[str, str] | None, list[int], list[int]]

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """What the model reads once, and the requests that it answers.

    Requests that differ only in their last token (the letters of a multiple choice) are one row,
    since the last token is not read.

    Attributes:
      tokens: the tokens read.
      requests: number of each request, with how many of its tokens are scored and its last token.
    """

    tokens: tuple[int, ...]
    requests: list[tuple[int, int, int]]


def score_requests(
    model: nnx.Module, requests: Sequence[Request], *, max_length: int, batch_size: BatchSize
) -> Iterator[tuple[int, Scored]]:
    """Score the continuation of each request after its context, in an order of our own.

    Args:
      model: maps tokens int32 [B, S] to logits [B, S, V].
      requests: a key that is not used here, the context's tokens, the continuation's.
      max_length: tokens that the model reads at most; longer requests lose their beginning.
      batch_size: rows at once.

    Yields:
      The number of a request, with the log-likelihood of its continuation, and whether each of its
      tokens is the most likely one.

    Raises:
      InputError: if a context or a continuation has no tokens, or the latter more than the model
        reads.
      ModelError: if a log-likelihood is not a number.
    """
    rows = sorted(_share_rows(requests, max_length), key=lambda row: -len(row.tokens))
    width = next_power(max((len(row.requests) for row in rows), default=1))
    graphdef, state = nnx.split(model)
    for batch in batch_size.plan([len(row.tokens) for row in rows]):
        chunk = rows[batch.start : batch.stop]
        found = _score(graphdef, state, *_pad(chunk, batch.rows, batch.slots, width))
        for row, answers in zip(chunk, _read_scores(chunk, *found), strict=True):
            for (number, _, _), answer in zip(row.requests, answers, strict=True):
                yield number, answer


def _share_rows(requests: Sequence[Request], max_length: int) -> list[Row]:
    shared: dict[tuple[int, ...], list[tuple[int, int, int]]] = defaultdict(list)
    longer = 0
    for number, (_, context, continuation) in enumerate(requests):
        if not 1 <= len(continuation) <= max_length:
            raise InputError(
                f"request {number}: the continuation has {len(continuation)} tokens of its own, "
                f"and can have 1 to {max_length} (max_length)"
            )
        if not context:
            raise InputError(
                f"request {number}: the context has no tokens, but the continuation's first token "
                "needs one before it: put a prefix token there (prefix_token_id)"
            )
        whole = (*context, *continuation)
        if len(whole) > max_length + 1:
            longer += 1
            whole = whole[-(max_length + 1) :]
        shared[whole[:-1]].append((number, len(continuation), whole[-1]))
    if longer:
        _log.warning(
            "%d of %d requests lose their beginning: more than %d tokens (max_length)",
            longer,
            len(requests),
            max_length + 1,
        )
    return [Row(tokens, members) for tokens, members in shared.items()]


def _pad(
    rows: Sequence[Row], batch: int, slots: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int32 [B, S], places of the last of them [B], what could follow it [B, C]."""
    tokens = np.zeros((batch, slots), np.int32)
    lasts, choices = np.zeros(batch, np.int32), np.zeros((batch, width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
        lasts[index] = len(row.tokens) - 1
        choices[index, : len(row.requests)] = [last for _, _, last in row.requests]
    return tokens, lasts, choices


@functools.partial(jax.jit, static_argnums=0)
def _score(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: jax.Array,
    lasts: jax.Array,
    choices: jax.Array,
) -> tuple[jax.Array, ...]:
    """Score what rows int32 [B, S] hold, and what could follow their last tokens, at `lasts` [B].

    Returns:
      Log-probabilities of tokens[:, 1:], float32 [B, S - 1], and whether each is the most likely
      one, bool [B, S - 1]; log-probabilities of `choices` [B, C] after the last token, and the most
      likely token there, int32 [B].
    """
    trace_counts["loglikelihood"] += 1
    model = nnx.merge(graphdef, state)
    # what is padding matters where rope depends on the length of a row
    told = (lasts + 1,) if isinstance(model, CausalLM) else ()
    logits = model(tokens, *told).astype(jnp.float32)
    normalizers = jax.nn.logsumexp(logits, axis=-1)
    best = jnp.argmax(logits, axis=-1)
    inner = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    ends = jnp.take_along_axis(logits, lasts[:, None, None], axis=1)[:, 0]
    end_normalizers = jnp.take_along_axis(normalizers, lasts[:, None], axis=1)
    return (
        inner - normalizers[:, :-1],
        best[:, :-1] == tokens[:, 1:],
        jnp.take_along_axis(ends, choices, axis=-1) - end_normalizers,
        jnp.take_along_axis(best, lasts[:, None], axis=1)[:, 0],
    )


def _read_scores(rows: Sequence[Row], *found: jax.Array) -> Iterator[list[Scored]]:
    """The answers to the requests of each row, from what `_score` found; summed in float64."""
    inner, hits, choices, best = map(np.asarray, found)
    for index, row in enumerate(rows):
        answers = []
        for place, (_, count, last) in enumerate(row.requests):
            before = slice(len(row.tokens) - count, len(row.tokens) - 1)
            total = inner[index, before].sum(dtype=np.float64) + float(choices[index, place])
            if math.isnan(total):
                raise ModelError("a log-likelihood is NaN: the logits overflow in this dtype")
            answers.append((float(total), bool(hits[index, before].all() and best[index] == last)))
        yield answers
