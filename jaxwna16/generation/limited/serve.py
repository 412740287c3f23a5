"""The child's side: answers calls, one a line, each within limits. Started by `child`."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

try:
    import resource
except ImportError:  # Windows
    resource = None

_SHOWN = 2000


def serve() -> None:
    """Answer until there are no more requests."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent to handle
    module, megabytes = sys.argv[2:]
    _limit_memory(int(megabytes) << 20)
    replies = _take_stdout()
    functions = importlib.import_module(module)
    for line in sys.stdin.buffer:
        name, arguments, seconds = json.loads(line)
        _limit_time(seconds)
        reply = _answer(getattr(functions, name), arguments)
        _limit_time(0)
        replies.write(reply + b"\n")
        replies.flush()


def _take_stdout() -> BinaryIO:
    """Where replies go; what libraries print goes nowhere, and so is not taken for one."""
    replies = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return replies


def _answer(function: Callable[..., Any], arguments: list[Any]) -> bytes:
    try:
        return json.dumps({"value": function(*arguments)}).encode()
    except BaseException as error:  # panics of Rust are not Exceptions
        return json.dumps(_describe(error)).encode()


def _describe(error: BaseException) -> dict[str, str]:
    try:
        text = str(error)[:_SHOWN]
    except Exception:
        text = ""
    return {"kind": type(error).__name__, "text": text}


def _limit_memory(nbytes: int) -> None:
    if resource is None:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = nbytes if hard == resource.RLIM_INFINITY else min(nbytes, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (ValueError, OSError):  # macOS knows this limit and refuses it
        pass


def _limit_time(seconds: float) -> None:
    """End the process by SIGPROF after so many seconds of computing from now on."""
    if resource is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
