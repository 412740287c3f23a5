"""How well a model predicts a text: perplexity over windows of tokens, per token, word and byte."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxwna16.errors import InputError
from jaxwna16.evaluation.text_windows import check_batch, check_finite, cut_windows
from jaxwna16.models.wrapped.media_tokens import refuse_media
from jaxwna16.programs import refuse_fork, trace_counts
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
      InputError: if the text is shorter than a window, has a token that stands for an image, video
        or sound, or a number is out of range.
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
    refuse_fork()
    windows = cut_windows(np.asarray(tokens), window, max_windows, stride)
    refuse_media(model, {"the text": np.asarray(tokens)})
    batch = check_batch(batch, windows)
    graphdef, state = nnx.split(model)
    shape = jax.ShapeDtypeStruct((batch, window), jnp.int32)
    score = _score.lower(graphdef, state, shape).compile()
    with show_steps("scoring", len(windows.tokens), visible=progress) as advance:
        start = time.perf_counter()
        found = windows.map(lambda rows: score(state, rows), batch, advance)
        seconds = time.perf_counter() - start
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


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
