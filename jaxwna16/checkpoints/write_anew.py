"""A checkpoint written anew, part by part; memory is one shard, or one tensor if that is larger."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxwna16.progress import show_bytes
from loaders.errors import CheckpointError
from loaders.files.safetensors_file import TensorInfo
from loaders.files.stamps import Stamp
from loaders.modules.experts import name_separately
from loaders.plan import Plan
from loaders.schemes.subconfigs import change_all
from loaders.stream import Progress, check_cast
from loaders.write import refuse_changes_of, write_checkpoint

Convert = Callable[[Any], Iterator[tuple[str, np.ndarray]]]
"""Makes the tensors to write of one part of the source, a `QuantizedModule` or `TensorInfo`."""


def write_anew(
    plan: Plan,
    destination: str | os.PathLike[str],
    config: Mapping[str, Any],
    convert: Convert,
    *,
    before: Mapping[str, Stamp],
    dtype: np.dtype | None,
    verb: str,
    progress: bool | None,
) -> None:
    """Write what `convert` makes of each part of a checkpoint, and stack stacked experts again.

    Args:
      plan: of the source.
      destination: the folder to make.
      config: what becomes config.json.
      convert: gives tensors by name; those of one expert of a stack as "experts.down_proj[3]".
      before: of the source's files, from before it was planned.
      dtype: what config.json is to state in place of the source's dtype; None leaves that.
      verb: what the bar of bytes says is done.
      progress: True, False, or None for a bar on a terminal only.

    Raises:
      CheckpointError: as `convert` and `write_checkpoint`, and if the source changes meanwhile.
    """
    with show_bytes(f"{verb} {plan.folder.name}", visible=progress) as report:
        write_checkpoint(
            Path(destination),
            _list_tensors(plan, convert, report),
            config if dtype is None else _state_dtype(config, dtype),
            beside=plan.folder,
            follow_links=plan.follow_links,
            check=functools.partial(refuse_changes_of, plan, before),
        )


def _list_tensors(
    plan: Plan, convert: Convert, report: Progress
) -> Iterator[tuple[str, np.ndarray]]:
    done = 0
    stacked: dict[str, np.ndarray] = {}
    for part in plan.list_parts():
        for name, array in convert(part):
            if name_separately(name) == [name]:
                yield name, array
            else:
                path = part.name if isinstance(part, TensorInfo) else part.path
                experts = plan.stacks[plan.places[path]].experts
                yield from _stack(name, array, experts, stacked)
        done += part.nbytes
        report(done, plan.nbytes, "")


def _stack(
    name: str, array: np.ndarray, experts: int, stacked: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Put "experts.down_proj[3]" into its array in `stacked`; gives that when it is complete."""
    whole, _, index = name.removesuffix("]").partition("[")
    if whole not in stacked:
        stacked[whole] = np.empty((experts, *array.shape), array.dtype)
    stacked[whole][int(index)] = array
    if int(index) == experts - 1:  # they follow each other in the files
        yield whole, stacked.pop(whole)


def _state_dtype(config: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """config.json with this dtype wherever it states one."""

    def state(part: Mapping[str, Any]) -> dict[str, Any]:
        stated = [key for key in ("dtype", "torch_dtype") if key in part]
        return {**part, **dict.fromkeys(stated, dtype.name)}

    return change_all(config, state)


def cast_tensor(array: np.ndarray, dtype: Any, file: Path, name: str) -> np.ndarray:
    """A tensor in a float dtype, if it has floats; None leaves it as it is.

    Raises:
      CheckpointError: naming it, if values are too large for the dtype.
    """
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if faults := check_cast(array, cast, file, name):
        raise CheckpointError(file.parent, faults)
    return cast
