"""How well a model predicts a text: perplexity over windows of tokens, per token, word and byte."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxwna16.errors import InputError, ModelError
from jaxwna16.programs import trace_counts
from jaxwna16.progress import show_steps

if TYPE_CHECKING:
    from jaxwna16.generation.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What `measure_perplexity` found.

    Attributes:
      perplexity: exp(nll).
      nll: mean negative log-likelihood of a scored token, in nats.
      tokens: how many tokens were scored.
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


class Windows(NamedTuple):
    """A text cut into windows.

    Attributes:
      tokens: int32 [N, S]; the first token of a window is never scored.
      scored: int32 [N], how many of a window's last tokens are scored: those that no earlier window
        has scored.
    """

    tokens: np.ndarray
    scored: np.ndarray

    def mask(self) -> np.ndarray:
        """Which of the tokens[:, 1:] are scored, bool [N, S - 1]."""
        width = self.tokens.shape[1] - 1
        return np.arange(width)[None, :] >= width - self.scored[:, None]

    def split(self, batch: int) -> Iterator[np.ndarray]:
        """The tokens, `batch` rows at a time: one shape, so the last is filled up with zeros."""
        for start in range(0, len(self.tokens), batch):
            rows = self.tokens[start : start + batch]
            yield np.pad(rows, ((0, batch - len(rows)), (0, 0)))


def measure_perplexity(
    model: nnx.Module,
    tokens: Sequence[int] | np.ndarray,
    *,
    window: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    batch: int = 1,
    progress: bool | None = False,
) -> Perplexity:
    """Measure how well a model predicts a text. It reads the text in windows, each by itself.

    With a stride below the window, windows overlap, and every token of the text except the first is
    scored once, with at least window - stride tokens before it (where the text has them). The last
    window ends where the text does. Without a stride, windows follow each other: the first token of
    each is only context, and tokens behind the last whole window are left out.

    The negative log-likelihood is computed in float32 inside the jitted function, which returns
    one number per token and no logits, and is summed in float64.

    Args:
      model: maps tokens int32 [B, S] to logits [B, S, V].
      tokens: the ids of the text. Put a BOS before them to have the text's first token scored.
      window: S, tokens a window.
      stride: tokens from the beginning of a window to that of the next; None is `window`.
      max_windows: how many windows at most, from the beginning; None for all.
      batch: B, windows scored at once.
      progress: True, False, or None for a bar on a terminal only.

    Raises:
      InputError: if the text is shorter than a window, or a number is out of range.
      ModelError: if a likelihood is not finite.

    Example:
      ```python
      model = jaxwna16.load_model("path/to/checkpoint", dtype="float32")
      tokenizer = jaxwna16.Tokenizer.from_folder("path/to/checkpoint")
      tokens = tokenizer.encode("It was a dark and stormy night. " * 8)
      found = jaxwna16.measure_perplexity(model, tokens, window=16, max_windows=4)
      print(found.perplexity)
      ```
    """
    windows = cut_windows(np.asarray(tokens), window, max_windows, stride)
    batch = check_batch(batch, windows)
    graphdef, state = nnx.split(model)
    shape = jax.ShapeDtypeStruct((batch, window), jnp.int32)
    score = _score.lower(graphdef, state, shape).compile()
    with show_steps("scoring", len(windows.tokens), visible=progress) as advance:
        start = time.perf_counter()
        scores = []
        for rows in windows.split(batch):
            scores.append(np.asarray(score(state, rows)))
            advance(batch)
        seconds = time.perf_counter() - start
    found = np.concatenate(scores)[: len(windows.tokens)]
    check_finite(found, windows, "likelihoods")
    chosen = found[windows.mask()]
    nll = float(chosen.mean(dtype=np.float64))
    return Perplexity(
        perplexity=_exp(nll),
        nll=nll,
        tokens=chosen.size,
        windows=len(windows.tokens),
        seconds=seconds,
        tokens_per_second=chosen.size / seconds,
    )


@dataclasses.dataclass(frozen=True)
class TextPerplexity:
    """Perplexity by word and by byte, which do not depend on the tokenizer.

    The definitions are those of lm-evaluation-harness.

    Attributes:
      words: how many there are: the parts between white space, `re.split(r"\\s+", text)`.
      bytes: of the text in UTF-8.
      word_perplexity: exp(-loglikelihood / words).
      byte_perplexity: exp(-loglikelihood / bytes).
      bits_per_byte: -loglikelihood / (bytes * ln 2).
    """

    words: int
    bytes: int
    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float


def relate_to_text(loglikelihood: float, text: str) -> TextPerplexity:
    """Divide the log-likelihood of all tokens of a text, in nats, by its words and its bytes."""
    words, size = len(re.split(r"\s+", text)), len(text.encode())
    return TextPerplexity(
        words=words,
        bytes=size,
        word_perplexity=_exp(-loglikelihood / words),
        byte_perplexity=_exp(-loglikelihood / size),
        bits_per_byte=-loglikelihood / size / math.log(2),
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


def find_prefix(tokenizer: Tokenizer) -> int | None:
    """The token that stands before a text, so that its first token can be scored: BOS, else EOS.

    None where the tokenizer names neither. lm-evaluation-harness chooses likewise.
    """
    bos = tokenizer.find_special("bos_token")
    return tokenizer.find_special("eos_token") if bos is None else bos


@functools.partial(jax.jit, static_argnums=0)
def _score(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> jax.Array:
    """Negative log-likelihoods, float32 [B, S - 1]: each token given those before it in its row."""
    trace_counts["perplexity"] += 1
    logits = nnx.merge(graphdef, state)(tokens)[:, :-1].astype(jnp.float32)
    targets = tokens[:, 1:, None]
    chosen = jnp.take_along_axis(logits, targets, axis=-1, mode="fill")[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def cut_windows(
    tokens: np.ndarray, window: int, max_windows: int | None, stride: int | None = None
) -> Windows:
    """Cut ids [T] into windows; arguments and errors as in `measure_perplexity`."""
    stride = window if stride is None else stride
    _check_numbers(tokens, window, max_windows, stride)
    if tokens.size < window:
        raise InputError(
            f"the text has {tokens.size} tokens, fewer than one window of {window}: "
            "give a longer text or a smaller window (--window)"
        )
    starts = list(range(0, tokens.size - window + 1, stride))[:max_windows]
    scored = [window - 1] + [min(stride, window - 1)] * (len(starts) - 1)
    rest = tokens.size - (starts[-1] + window)
    if rest and stride < window and (max_windows is None or len(starts) < max_windows):
        starts.append(tokens.size - window)
        scored.append(rest)
    rows = tokens[np.asarray(starts)[:, None] + np.arange(window)[None, :]]
    return Windows(rows.astype(np.int32), np.asarray(scored, np.int32))


def check_batch(batch: int, windows: Windows) -> int:
    """How many windows are scored at once: `batch`, or all if there are fewer.

    Raises:
      InputError: if it is below 1.
    """
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    return min(batch, len(windows.tokens))


def check_finite(found: np.ndarray, windows: Windows, what: str) -> None:
    """Check that all numbers [N, S - 1] are finite, also those of tokens that are not scored.

    Raises:
      ModelError: naming the first token whose number is not finite.
    """
    bad = np.argwhere(~np.isfinite(found))
    if len(bad):
        row, column = bad[0]
        raise ModelError(
            f"{len(bad)} of {found.size} {what} are not finite, the first for token {column + 1} "
            f"of window {row} (id {windows.tokens[row, column + 1]}): the logits overflow in "
            "this dtype, or the ids are not of this model's tokenizer"
        )


def _check_numbers(tokens: np.ndarray, window: int, max_windows: int | None, stride: int) -> None:
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise InputError(f"tokens must be a row of ids, got {tokens.dtype} {list(tokens.shape)}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**31:
        raise InputError(f"ids must lie in [0, 2^31), got {tokens.min()} to {tokens.max()}")
    if window < 2:
        raise InputError(f"a window must have at least 2 tokens, got {window} (--window)")
    if not 1 <= stride <= window:
        raise InputError(
            f"a stride must be from 1 to the window, {window} tokens, got {stride} (--stride): "
            "with a larger one tokens would be left out"
        )
    if max_windows is not None and max_windows < 1:
        raise InputError(f"max_windows must be at least 1, got {max_windows}")


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
