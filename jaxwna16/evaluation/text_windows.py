"""A text cut into windows of tokens, which a model reads one by one, and what it finds of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxwna16.errors import InputError, ModelError


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

    def map(
        self, score: Callable[[np.ndarray], Any], batch: int, advance: Callable[[int], None]
    ) -> Any:
        """What a function finds of all windows.

        Args:
          score: tokens [batch, S] -> arrays [batch, …] of those, one or a tree of them.
          batch: how many windows it is given at once.
          advance: told of each batch when it is done.

        Returns:
          The same tree of NumPy arrays [N, …].
        """
        found = []
        for rows in self.split(batch):
            found.append(jax.tree.map(np.asarray, score(rows)))
            advance(batch)
        count = len(self.tokens)
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *found)


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
