"""How well a model predicts a text: perplexity over consecutive windows of tokens."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxwna16.errors import InputError, ModelError


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What `measure_perplexity` found.

    Attributes:
      perplexity: exp(nll).
      nll: mean negative log-likelihood of a scored token, in nats.
      tokens: how many tokens were scored, window - 1 in each window.
      windows: how many windows there were.
      seconds: wall time of the scoring, without tracing and compiling.
      tokens_per_second: tokens / seconds.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seconds: float
    tokens_per_second: float


def measure_perplexity(
    model: nnx.Module,
    tokens: Sequence[int] | np.ndarray,
    *,
    window: int = 512,
    max_windows: int | None = None,
    batch: int = 1,
) -> Perplexity:
    """Measure how well a model predicts a text, cut into consecutive windows that do not overlap.

    Each window is read by itself, so its first token is only context and the other window - 1 are
    scored. Tokens behind the last whole window are left out.
    The negative log-likelihood is computed in float32 inside the jitted function, which returns
    one number per token and no logits, and is summed in float64.

    Args:
      model: maps tokens int32 [B, S] to logits [B, S, V].
      tokens: the ids of the text.
      window: S, tokens a window.
      max_windows: how many windows at most, from the beginning; None for all.
      batch: B, windows scored at once.

    Raises:
      InputError: if the text is shorter than a window, or a number is out of range.
      ModelError: if a likelihood is not finite.
    """
    windows = cut_windows(np.asarray(tokens), window, max_windows)
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    batch = min(batch, len(windows))
    # The last batch is filled up, so that there is one shape to trace and compile.
    filled = np.pad(windows, ((0, -len(windows) % batch), (0, 0))).reshape(-1, batch, window)
    graphdef, state = nnx.split(model)
    score = _score.lower(graphdef, state, filled[0]).compile()
    start = time.perf_counter()
    scores = np.concatenate([np.asarray(score(state, rows)) for rows in filled])[: len(windows)]
    seconds = time.perf_counter() - start
    _check_finite(scores, windows)
    nll = float(scores.mean(dtype=np.float64))
    return Perplexity(
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        tokens=scores.size,
        windows=len(windows),
        seconds=seconds,
        tokens_per_second=scores.size / seconds,
    )


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file (a byte order mark is dropped).

    Raises:
      InputError: if it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text, byte {error.start} is wrong") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not text:
        raise InputError(f"{path}: the file is empty")
    return text


@functools.partial(jax.jit, static_argnums=0)
def _score(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> jax.Array:
    """Negative log-likelihoods, float32 [B, S - 1]: each token given those before it in its row."""
    logits = nnx.merge(graphdef, state)(tokens)[:, :-1].astype(jnp.float32)
    targets = tokens[:, 1:, None]
    chosen = jnp.take_along_axis(logits, targets, axis=-1, mode="fill")[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def cut_windows(tokens: np.ndarray, window: int, max_windows: int | None) -> np.ndarray:
    """Cut ids [T] into int32 [windows, window]; arguments and errors as in `measure_perplexity`."""
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise InputError(f"tokens must be a row of ids, got {tokens.dtype} {list(tokens.shape)}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**31:
        raise InputError(f"ids must lie in [0, 2^31), got {tokens.min()} to {tokens.max()}")
    if window < 2:
        raise InputError(f"a window must have at least 2 tokens, got {window} (--window)")
    if max_windows is not None and max_windows < 1:
        raise InputError(f"max_windows must be at least 1, got {max_windows}")
    total = tokens.size // window
    if not total:
        raise InputError(
            f"the text has {tokens.size} tokens, fewer than one window of {window}: "
            "give a longer text or a smaller window (--window)"
        )
    count = total if max_windows is None else min(total, max_windows)
    return tokens[: count * window].reshape(count, window).astype(np.int32)


def _check_finite(scores: np.ndarray, windows: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        row, column = bad[0]
        raise ModelError(
            f"{len(bad)} of {scores.size} likelihoods are not finite, the first for token "
            f"{column + 1} of window {row} (id {windows[row, column + 1]}): the logits overflow in "
            "this dtype, or the ids are not of this model's tokenizer"
        )
