"""The parent's side: a process that answers calls, each within limits of time and memory.

A chat template is a program, and a tokenizer.json can multiply text or search it with a pattern
that never ends. No check inside one process bounds all of that: one operation of `str` or one
search takes as long as it takes. So it runs in a child, which the system ends at its limits.

The child is a bare interpreter. It starts with the first call, in about 10 ms and what its imports
take, answers calls until its parent ends, and is replaced after it was ended. It can do nothing
else for a stranger than its functions can: requests and replies are JSON, one a line.

On Linux both limits hold. macOS ignores that of memory, and Windows has neither: there, the clock
alone ends a call.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from jaxwna16.generation.limited.serve import serve; serve()"
)
_ROOT = str(Path(__file__).parents[3])
_WAITING_SECONDS = 300.0
"""By the clock, beyond the seconds of computing: for a machine that has other things to do."""
_MAX_REPLY = 256 << 20
_ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class FailedCallError(Exception):
    """A function of the child raised an error; `kind` is the name of its type."""

    def __init__(self, kind: str, text: str):
        self.kind = kind
        super().__init__(text or kind)


class LimitError(Exception):
    """A call was ended at a limit, or the child ended by itself; the text says which."""


class Child:
    """A process that calls the functions of one module of this package.

    Args:
      module: its name; its functions take and return JSON values.
      megabytes: of address space that the process may have.
    """

    def __init__(self, module: str, megabytes: int):
        self._module, self._megabytes = module, megabytes
        self._setup: list[tuple[str, tuple[Any, ...]]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.RLock()

    def call(self, name: str, *arguments: Any, seconds: float) -> Any:
        """Call a function.

        Args:
          name: of the function.
          arguments: JSON values.
          seconds: of computing that it may take.

        Raises:
          FailedCallError: if it raises an error.
          LimitError: if it takes more than it may, or brings the process to an end.
          OSError: if no process can be started.
        """
        with self._lock:
            self._start(seconds)
            return self._ask(name, arguments, seconds)

    def set_up(self, name: str, *arguments: Any, seconds: float) -> Any:
        """Call a function, and again in every process that replaces this one."""
        with self._lock:
            value = self.call(name, *arguments, seconds=seconds)
            self._setup.append((name, arguments))
            return value

    def _start(self, seconds: float) -> None:
        # after a fork the process belongs to the parent, with which we must not mix our calls
        if self._process is not None and self._owner == os.getpid():
            return
        path = json.dumps([_ROOT, *sys.path])
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, path, self._module, str(self._megabytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_ONE_THREAD},
        )
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _end, self._process, self._owner)
        for name, arguments in self._setup:
            self._ask(name, arguments, seconds)

    def _ask(self, name: str, arguments: tuple[Any, ...], seconds: float) -> Any:
        assert self._process is not None
        request = json.dumps([name, arguments, seconds]).encode() + b"\n"
        late = threading.Event()
        timer = threading.Timer(seconds + _WAITING_SECONDS, _kill, (self._process, late))
        timer.start()
        try:
            line = _exchange(self._process, request)
        except BaseException:  # an interrupt: the reply to come would be taken for another's
            self._stop()
            raise
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            raise LimitError(self._explain_end(seconds, late.is_set()))
        reply = json.loads(line)
        if reply.get("kind") == "MemoryError":
            self._stop()
            raise LimitError(f"it needs more than {self._megabytes} MB of memory")
        if "kind" in reply:
            raise FailedCallError(reply["kind"], reply["text"])
        return reply["value"]

    def _explain_end(self, seconds: float, late: bool) -> str:
        code = self._stop()
        if late:
            return f"it had no answer after {seconds + _WAITING_SECONDS:g} s by the clock"
        if os.name == "posix" and code == -signal.SIGPROF:
            return f"it takes more than {seconds:g} s"
        if code < 0:
            name = signal.Signals(-code).name
            return (
                f"it needs more than {self._megabytes} MB of memory, or breaks the process: {name}"
            )
        return f"the process that it runs in ended with exit code {code}"

    def _stop(self) -> int:
        assert self._process is not None
        process, self._process = self._process, None
        self._end()
        return process.returncode


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """One line for another, or what there is of it if the process ends."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(request)
        process.stdin.flush()
    except BrokenPipeError:
        return b""
    return process.stdout.readline(_MAX_REPLY)


def _kill(process: subprocess.Popen[bytes], late: threading.Event) -> None:
    late.set()
    process.kill()


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """End the process, unless it is that of the process we were forked from."""
    if os.getpid() != owner:
        return
    for pipe in (process.stdin, process.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except BrokenPipeError:
            pass
    try:
        process.wait(0.2)  # it may have ended already, for a reason that its exit code tells
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
