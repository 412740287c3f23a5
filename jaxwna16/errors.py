"""Errors of the public face, all of them `Wna16Error` and `ValueError`, and its one warning."""

from __future__ import annotations

from collections.abc import Sequence

from loaders.errors import cut_text, escape_line, list_first
from pallas_kernels.errors import Wna16Error

_MOST_REASONS, _SHOWN = 1000, 100


class _ListingError(Wna16Error, ValueError):
    """An error that lists every reason it found, one a line; its text a hundred."""

    def __init__(self, summary: str, reasons: Sequence[str] = ()):
        self.summary = cut_text(summary)
        self.reasons = tuple(list_first(reasons, _MOST_REASONS))
        lines = [self.summary, *list_first(reasons, _SHOWN)]
        super().__init__("\n  - ".join(map(escape_line, lines)))


class ModelError(_ListingError):
    """A model cannot be built from this configuration, or its parameters do not fit it."""


class InputError(_ListingError):
    """A request is impossible: its prompts, options, text or files."""


class NanWarning(RuntimeWarning):
    """Generation of a row ended because the model's logits for it are not a distribution."""
