"""Rows of many lengths in batches of few shapes: each shape is compiled once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxwna16.errors import InputError

_LOGIT_BYTES = 2**29


class Batch(NamedTuple):
    """Some of the rows, and the shape they are padded to.

    Attributes:
      start, stop: the rows, by number.
      rows, slots: the shape.
    """

    start: int
    stop: int
    rows: int
    slots: int


class BatchSize(NamedTuple):
    """How many rows are run at once.

    Attributes:
      rows: None for as many as have 512 MiB of float32 logits together, up to `most`.
      most: see `rows`.
      vocab_size: of the model.
      slots: the most slots of a row. Padding beyond the model's own length would change the angles
        of dynamic rope.
    """

    rows: int | None
    most: int
    vocab_size: int
    slots: int

    def plan(self, lengths: Sequence[int]) -> Iterator[Batch]:
        """Divide rows of these lengths; the longest comes first, and none exceeds `slots`."""
        start = 0
        while start < len(lengths):
            slots = min(pad_length(lengths[start]), self.slots)
            rows = self.rows
            if rows is None:
                fitting = max(_LOGIT_BYTES // (4 * slots * self.vocab_size), 1)
                rows = min(self.most, 1 << fitting.bit_length() - 1)
            rows = min(rows, next_power(len(lengths)))
            yield Batch(start, min(start + rows, len(lengths)), rows, slots)
            start += rows


def read_batch_size(batch_size: int | str) -> int | None:
    """A number of rows, None for "auto" (and "auto:4": our choice is made once).

    Raises:
      InputError: if it is neither.
    """
    text = str(batch_size)
    if text.split(":")[0] == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f'batch_size: expected a number above 0 or "auto", got {batch_size!r}')
    return int(text)


def pad_length(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128, …: two for each power of two."""
    power = max(next_power(length), 16)
    return power * 3 // 4 if length <= power * 3 // 4 and power > 16 else power


def next_power(number: int) -> int:
    """The next power of two, from 1 on."""
    return 1 << (number - 1).bit_length()
