"""Load a mutant and hold it to the promise: the exact numbers, or one of our errors; nothing else.

While the loader runs, a hook of the interpreter notes every file that is opened, a timer ends what
hangs, and the address space is limited, so that a huge shape cannot be allocated unseen.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxwna16 import load_checkpoint
from jaxwna16.cli import verify
from loaders.errors import CheckpointError, Fault
from loaders.files.folder import CONFIG
from tests.fault_kinds import find_kind
from tests.fuzz.bases import make_bases
from tests.fuzz.files import Entry, write_entries
from tests.fuzz.oracle import RefusedError, expect
from tests.peaks import begin_peak, read_status

SECONDS = 20.0
"""Of computing, after which a mutant counts as one that hangs; the slowest take about one."""
_WAITING_SECONDS = 300.0
"""The same of waiting, as for a pipe; or for a processor, on a machine with other things to do."""
MAX_BYTES = 96 << 20
"""By which resident memory may grow; the mutants are of a few KB, XLA's compiler takes the rest."""
_ADDRESSES = 2 << 30
_MAX_MESSAGE = 20_000
_SYSTEM = (
    *("/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup/"),  # how much memory there is
    *(f"{path}{os.sep}" for path in (sys.prefix, sys.base_prefix, Path(__file__).parents[2])),
)
"""What may be opened beside the mutant: Python's own modules among others."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
      kinds: the kinds of its faults (see `tests.fault_kinds`); empty if it was loaded.
      seconds: of computing that loading took, in all threads; a busy machine adds none.
      nbytes: by which resident memory grew meanwhile.
    """

    kinds: tuple[int, ...]
    seconds: float
    nbytes: int


class HangError(BaseException):
    """A mutant took too long; no `except Exception` may swallow it."""


def check_mutant(base: str, files: Mapping[str, Entry], root: Path, *, harmless: bool) -> Outcome:
    """Write a mutant below `root`, load it, and compare.

    Raises:
      AssertionError: if it breaks the promise.
    """
    folder = root / "c"
    shutil.rmtree(folder, ignore_errors=True)
    _write_outside(root / "outside")
    write_entries(folder, files)
    with _watch(folder) as watched:
        params, faults = _try(lambda: load_checkpoint(folder, progress=False).params)
    with _watch(folder):
        _, found = _try(lambda: _verify(folder))
    assert watched.nbytes <= MAX_BYTES, f"resident memory grew by {watched.nbytes} bytes"
    for fault in faults:
        assert fault.what and (fault.file or fault.tensor or "not a folder" in fault.what)
        assert fault.way_out, f"no way out of: {fault}"
        assert len(str(fault)) < _MAX_MESSAGE, str(fault)[:200]
    if params is None:
        assert found, "verify finds nothing in what cannot be loaded"
        assert not harmless, faults
    else:
        # verify also looks for the tensors of a model, and in a converted copy at every byte
        others = [fault for fault in found if fault.file and find_kind(fault) != 16]
        assert not others, f"verify refuses what loads: {others}"
        _compare(base, folder, dict(list_leaves(params)), harmless=harmless)
    kinds = tuple(sorted({find_kind(fault) for fault in faults}))
    return Outcome(kinds, watched.seconds, watched.nbytes)


def _verify(folder: Path) -> None:
    """Every check of `jaxwna16 verify`.

    Raises:
      CheckpointError: of all the faults that it finds.
    """
    report = verify.run(argparse.Namespace(checkpoint=folder, oracle=False, follow_links=False))
    if "error" in report:
        raise CheckpointError(folder, [Fault(**fault) for fault in report["error"]["faults"]])


def _try(read: Callable[[], Any]) -> tuple[Any, tuple[Fault, ...]]:
    """What reading gives, or the faults that it raises; no other error may come out of it."""
    try:
        return read(), ()
    except CheckpointError as error:
        str(error).encode()  # can be printed
        return None, error.faults


def list_leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Name -> array of a params tree."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from list_leaves(value, f"{path}{key}.")
        else:
            yield path + key, np.asarray(value)


def _compare(base: str, folder: Path, found: dict[str, np.ndarray], *, harmless: bool) -> None:
    """Equal to what the oracle reads; to the base, if nothing but its spelling was changed."""
    if harmless:
        assert_equal(found, _bases[base])
        return
    try:
        expected = expect(folder, found)
    except RefusedError:  # of what can change no number, such as a field that it does not know
        config = json.loads(make_bases()[base][CONFIG])
        expected = expect(folder, found, config)
    assert_equal(found, expected)


def assert_equal(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, array in found.items():
        other = expected[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape), name
        assert array.tobytes() == np.ascontiguousarray(other).tobytes(), name


_bases: dict[str, dict[str, np.ndarray]] = {}


def load_bases(root: Path) -> None:
    """Load every base once, which also compiles everything; they are what the oracle says.

    Raises:
      AssertionError: if one is not.
    """
    for name, files in make_bases().items():
        if name not in _bases:
            folder = root / name
            write_entries(folder, files)
            found = dict(list_leaves(load_checkpoint(folder, progress=False).params))
            assert_equal(found, expect(folder, found))
            _bases[name] = found


def _write_outside(folder: Path) -> None:
    """A whole checkpoint beside the mutant, which nothing may read."""
    if not folder.exists():
        write_entries(folder, make_bases()["channel"])


class _Watched:
    seconds: float = 0.0
    nbytes: int = 0


_opened: list[str] = []
_watching = False


def _note(event: str, arguments: tuple) -> None:
    if _watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_note)


@contextlib.contextmanager
def _watch(folder: Path) -> Iterator[_Watched]:
    """Note what is opened, how long it takes and how far memory grows.

    Raises:
      AssertionError: if a file outside of the folder was opened.
      HangError: after `SECONDS` of computing, or `_WAITING_SECONDS`.
    """
    global _watching
    watched = _Watched()
    _opened.clear()
    before = begin_peak()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (read_status("VmSize") + _ADDRESSES, limits[1]))
    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, SECONDS),
        signal.ITIMER_REAL: (signal.SIGALRM, _WAITING_SECONDS),
    }
    previous = {number: signal.signal(number, _end) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    start, _watching = time.process_time(), True
    try:
        yield watched
    finally:
        _watching = False
        watched.seconds = time.process_time() - start
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    watched.nbytes = max(0, read_status("VmHWM") - before)
    real = os.path.realpath(folder)
    for path in _opened:
        inside = os.path.realpath(path).startswith(f"{real}{os.sep}")
        allowed = path.startswith(_SYSTEM) or _may_be_a_source(path)
        assert inside or allowed, f"opened {path}"


def _may_be_a_source(path: str) -> bool:
    """A converted copy is compared with the checkpoint that it says it was made of."""
    folder, name = os.path.split(path)
    return folder == "/gone" and (name == "config.json" or name.endswith(".safetensors"))


def _end(*_: object) -> None:
    raise HangError
