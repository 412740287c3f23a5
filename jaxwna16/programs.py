"""Programs, what JAX compiles a jitted function to for given shapes: counted, compiled, kept.

A program depends on a model's architecture and schemes, not on its weights or its folder. Models
with the same architecture and schemes share all programs, and a process compiles them once.
"""

from __future__ import annotations

import collections
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxwna16.errors import InputError

trace_counts: collections.Counter[str] = collections.Counter()
"""How often functions were traced in this process: "prefill" and "decode" of generation,
"perplexity", "divergence" and "loglikelihood" of evaluation."""
_processes: list[int] = []  # where a checkpoint was loaded first: this one, or one it is a fork of


def refuse_fork(*, loads: bool = False) -> None:
    """Refuse to compute in a fork of a process with a model: XLA's threads are not in it.

    Without them the first computation would wait forever.

    Args:
      loads: whether arrays are about to be made, so that later forks cannot compute.

    Raises:
      InputError: if this process is such a fork.
    """
    if _processes and _processes[0] != os.getpid():
        raise InputError(
            "this process was forked from one that had loaded a checkpoint, and JAX does not work "
            "in such a fork: start processes with multiprocessing.get_context('spawn'), and load "
            "the checkpoint in each"
        )
    if loads and not _processes:
        _processes.append(os.getpid())


class Compilation:
    """Programs that are compiled at the same time, in threads, since XLA releases Python's lock.

    They are lowered in the caller's thread, since tracing holds that lock; a program is compiled
    while the next one is traced. One is compiled at once for each two cores, as XLA by itself uses
    several, in the order in which they were started; each needs memory of its own.
    After an interrupt they go on in the background, since XLA cannot be stopped.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(max(1, _count_cores() // 2), "jaxwna16-compile")
        self._futures: dict[str, Future[Any]] = {}

    def start(self, name: str, program: jax.stages.Lowered) -> None:
        """Compile the result of `jax.jit(…).lower(…)`: a later call of the function uses it."""
        self._futures[name] = self._pool.submit(program.compile)

    def wait(self, *names: str) -> None:
        """Wait until these programs are compiled, all of them if none is named.

        A name that is not among them stands for a program that is compiled when it is called.

        Raises:
          Exception: what compiling raised, as it is.
        """
        for name in names or self._futures:
            if name in self._futures:
                self._futures[name].result()


def is_spread(model: Any) -> bool:
    """Whether a pytree's arrays are on several devices, so that only the compiler knows where
    results will be."""
    return len(list_devices(model)) > 1


def foresee(program: jax.stages.Lowered, model: Any) -> Any:
    """Shapes of the arrays that a program will return, for lowering a function that takes them.

    Args:
      program: takes `model`, and other arguments that are not committed to a device.
      model: a pytree on one device. Results will be on that device, and committed to it if the
        model is, which JAX compiles as a program of its own.
    """
    if not any(array.committed for array in _list_arrays(model)):
        return program.out_info
    place = jax.sharding.SingleDeviceSharding(*list_devices(model))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), program.out_info
    )


def _list_arrays(model: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array)]


def list_devices(model: Any) -> set[Any]:
    """The devices that hold some of a model."""
    return {device for array in _list_arrays(model) for device in array.devices()}


def _count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_programs(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Let JAX keep what takes a second or more to compile, for the next process.

    This is JAX's own persistent cache, with its settings and for all programs of the process. So a
    library does not turn it on by itself; the command line does. The folder has no size limit. JAX
    executes the programs in it, so nobody else may be able to write to it.

    Args:
      folder: where to keep programs. None is the folder that JAX is already set to
        (`JAX_COMPILATION_CACHE_DIR`), else `jaxwna16/compiled` in the user's folder of caches
        (`XDG_CACHE_HOME`, or `~/.cache`), which the command line uses.

    Returns:
      The folder; None where JAX's cache is turned off (`JAX_ENABLE_COMPILATION_CACHE=false`), or
      where none is given and the user's own cannot be made.

    Raises:
      InputError: if a folder is given that cannot be made.

    Example:
      ```python
      folder = jaxwna16.keep_programs("path/to/programs")
      ```
    """
    config: Any = jax.config  # its settings are not known to type checkers
    if not config.jax_enable_compilation_cache:
        return None
    chosen = config.jax_compilation_cache_dir
    if folder is None and chosen is not None:
        return Path(chosen)
    place = _find_user_folder() if folder is None else Path(folder).absolute()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder is None:
            return None
        raise InputError(f"{place}: cannot be made: {error.strerror}") from error
    if chosen != str(place):
        config.update("jax_compilation_cache_dir", str(place))
        compilation_cache.reset_cache()  # or JAX goes on with the folder that it has opened
    return place


def _find_user_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "jaxwna16", "compiled")
