"""`jaxwna16 convert`: writes a copy of a checkpoint that loads as fast as its bytes are read."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxwna16.cli.arguments import add_json, add_links

if TYPE_CHECKING:
    from rich.console import Console


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a copy of a checkpoint with its weights already repacked. The copy loads as fast as "
        "its bytes are read. Only jaxwna16 can read it: keep the original."
    )
    parser.add_argument("source", metavar="DIR", help="checkpoint folder, or a name on the hub")
    parser.add_argument("destination", metavar="DST", help="new folder; it must not exist")
    add_links(parser)
    add_json(parser, sys.modules[__name__])


def run(args: argparse.Namespace) -> dict[str, Any]:
    from jaxwna16.checkpoints.convert import convert_checkpoint
    from jaxwna16.checkpoints.load import resolve_folder
    from loaders.open import open_plan
    from pallas_kernels.format.spec import LAYOUT_VERSION

    source, destination = resolve_folder(args.source), Path(args.destination)
    started = time.perf_counter()
    convert_checkpoint(source, destination, follow_links=args.follow_links)
    seconds = time.perf_counter() - started
    old, new = open_plan(source, follow_links=args.follow_links), open_plan(destination)
    return {
        "source": str(source),
        "destination": str(destination),
        "modules": len(old.quantized),
        "source_bytes": old.nbytes,
        "bytes": new.nbytes,
        "ratio": old.nbytes / new.nbytes if new.nbytes else None,
        "layout_version": LAYOUT_VERSION,
        "seconds": seconds,
    }


def show(report: dict[str, Any], console: Console) -> None:
    from rich.filesize import decimal

    from jaxwna16.cli.screen import count
    from loaders.errors import escape_line

    console.print(
        f"{count(report['modules'], 'module')} converted, {decimal(report['source_bytes'])} -> "
        f"{decimal(report['bytes'])} in {report['seconds']:.1f} s"
    )
    console.print(escape_line(f"made {report['destination']}"))
    console.print("keep the original: other tools need it, and the copy is refused if it changes")
