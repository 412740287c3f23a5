"""Errors of this package on the command line: text on stderr for people, JSON for programs."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.text import Text

from jaxwna16.cli.folded_names import fold_names
from jaxwna16.errors import InputError, ModelError
from loaders.errors import CheckpointError, Fault, escape_line, limit_faults

_MOST_FAULTS = 1000


def describe_error(error: Exception) -> dict[str, Any]:
    """The error as {"message", "faults"}: faults with file, tensor, what and way_out."""
    faults = map(dataclasses.asdict, limit_faults(_list_faults(error), _MOST_FAULTS))
    return {"message": _summarize(error), "faults": [*faults]}


def show_error(error: dict[str, Any], console: Console) -> None:
    """Print a described error; faults that differ only in layer numbers are one line."""
    console.print(Text.assemble(("error: ", "bold red"), escape_line(error["message"])))
    alike: dict[Fault, list[str]] = defaultdict(list)
    for fault in error["faults"]:
        alike[Fault(**fault | {"tensor": ""})].append(fault["tensor"])
    for fault, tensors in alike.items():
        for tensor in fold_names(tensors):
            console.print(f"  - {dataclasses.replace(fault, tensor=tensor)}")


def _summarize(error: Exception) -> str:
    if isinstance(error, InputError | ModelError):
        return error.summary
    return str(error).partition("\n  - ")[0]


def _list_faults(error: Exception) -> list[Fault]:
    if isinstance(error, CheckpointError):
        return list(error.faults)
    if isinstance(error, ModelError):
        return list(map(read_reason, error.reasons))
    return list(map(Fault, error.reasons)) if isinstance(error, InputError) else []


def read_reason(reason: str) -> Fault:
    """Turn a ModelError's reason ("model.norm.weight: expected …") into a fault with its tensor."""
    name, colon, what = reason.partition(": ")
    return Fault(what, tensor=name) if colon and " " not in name else Fault(reason)
