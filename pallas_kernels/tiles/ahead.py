"""How much of the next weights small kernels bring into the cache while they wait.

A kernel that ends a product (`pallas_kernels.triton.step.add_norm`) has a program for each row, and
leaves the rest of the GPU idle. With `ahead` bytes, further programs read as much of the words that
the next product takes. So these come from the L2 cache. Whether that pays depends on the GPU: it is
off unless a table of tuned tiles, or `fix_ahead`, says a number.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.tables import load_ahead

_fixed: contextvars.ContextVar[int | None] = contextvars.ContextVar("ahead", default=None)


@contextlib.contextmanager
def fix_ahead(size: int | None) -> Iterator[None]:
    """Trace everything inside with so many bytes, for timing and tests; None is the table's."""
    token = _fixed.set(size)
    try:
        yield
    finally:
        _fixed.reset(token)


def choose_ahead(device: Device) -> int:
    """Bytes: a fixed number, else that of the device's table, else 0.

    Raises:
      TableError: if this GPU has a table that cannot be used.
    """
    fixed = _fixed.get()
    return load_ahead(device) if fixed is None else fixed
