"""Which keys of a `config.json` are looked at while a family reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_asked: ContextVar[set[str] | None] = ContextVar("asked", default=None)


class AskedKeys(dict[str, Any]):
    """A dict that notes which of its keys are asked for, within `note_keys`."""

    def __getitem__(self, key: str) -> Any:
        _note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        _note(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        _note(key)
        return super().get(key, default)


@contextmanager
def note_keys() -> Iterator[set[str]]:
    """The keys that are asked for until the end of the block."""
    asked: set[str] = set()
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


def _note(key: object) -> None:
    asked = _asked.get()
    if asked is not None and isinstance(key, str):
        asked.add(key)
