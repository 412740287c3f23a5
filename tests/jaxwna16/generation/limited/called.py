"""What the child of `test_child` is asked to do."""

from __future__ import annotations

import builtins
import os
import time
from typing import Any

_kept: list[Any] = []


def echo(value: Any) -> Any:
    return value


def print_below_python() -> str:
    os.write(1, b'{"value": "forged"}\n')
    return "returned"


def fail(name: str, text: str) -> None:
    raise getattr(builtins, name)(text)


def fail_without_text() -> None:
    raise KeyError


def spin() -> None:
    while True:
        pass


def fill() -> None:
    _ = "x" * (1 << 30)


def abort() -> None:
    os.abort()


def leave() -> None:
    os._exit(3)


def wait() -> None:
    time.sleep(100)


def work(seconds: float) -> bool:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return True


def remember(value: Any) -> None:
    _kept[:] = [value]


def recall() -> Any:
    return _kept[0]


def name_process() -> int:
    return os.getpid()
