"""`jaxwna16 dequantize`: writes a packed checkpoint's weights as floats."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxwna16.cli.arguments import add_json, add_rewrite

if TYPE_CHECKING:
    from rich.console import Console


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a packed checkpoint's weights as floats. They equal those of compressed-tensors bit "
        "for bit: they are computed in the dtype of the scales, then cast if --dtype asks for it."
    )
    add_rewrite(parser, "packed checkpoint")
    add_json(parser, sys.modules[__name__])


def run(args: argparse.Namespace) -> dict[str, Any]:
    from jaxwna16.checkpoints.dequantize import dequantize_checkpoint
    from jaxwna16.checkpoints.load import resolve_folder
    from jaxwna16.cli.rewriting import compare

    source, destination = resolve_folder(args.source), Path(args.destination)
    started = time.perf_counter()
    dequantize_checkpoint(source, destination, dtype=args.dtype, follow_links=args.follow_links)
    seconds = time.perf_counter() - started
    return compare(source, destination, seconds, follow_links=args.follow_links)


def show(report: dict[str, Any], console: Console) -> None:
    from jaxwna16.cli.rewriting import show_sizes
    from jaxwna16.cli.screen import count

    console.print(f"{count(report['modules'], 'module')} dequantized")
    show_sizes(report, console)
