"""The files of `jaxwna16 bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def make_folder(folder: Path) -> None:
    """Make the folder first, so that a wrong name costs no time on the GPU."""
    from jaxwna16.errors import InputError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot write results there: {error}") from error


def write(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the tables."""
    from jaxwna16.bench.output import write_tables

    report["files"] = write_tables(report, args.output, name_files(args))


def draw(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Draw the plot beside the tables. If this fails, only the plot is missing."""
    from jaxwna16.bench.output import write_plot

    try:
        report["files"] += write_plot(report, args.output, name_files(args))
    except Exception as error:  # whatever another library raises
        report["problems"].append(f"no plot: {error}")
        write(report, args)


def name_files(args: argparse.Namespace) -> str:
    if args.step is not None:
        return "step"
    if args.moe is not None:
        return "moe-tuning" if args.tune else "moe"
    return "tuning" if args.tune else "kernels"
