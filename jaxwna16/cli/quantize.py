"""`jaxwna16 quantize`: rounds the linear weights of a float checkpoint to the nearest integers."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxwna16.cli.arguments import add_json, add_rewrite

if TYPE_CHECKING:
    from rich.console import Console

_CHANNEL = "channel"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Round the linear weights of a Hugging Face folder to the nearest integers, and write a "
        "pack-quantized checkpoint. compressed-tensors, transformers and vLLM read it, too."
    )
    add_rewrite(parser, "checkpoint that is not quantized")
    parser.add_argument(
        "--bits", type=int, choices=(4, 8), default=4, help="bits per weight (default: 4)"
    )
    parser.add_argument(
        "--group-size",
        metavar="G",
        type=_read_group_size,
        default=128,
        help='input features that share a scale (default: 128); "channel" means all of them',
    )
    zero_points = parser.add_mutually_exclusive_group()
    zero_points.add_argument(
        "--symmetric", action="store_true", default=True, help="no zero points (the default)"
    )
    zero_points.add_argument(
        "--asymmetric", dest="symmetric", action="store_false", help="with zero points"
    )
    left_alone = parser.add_mutually_exclusive_group()
    left_alone.add_argument(
        "--ignore",
        metavar="MODULE",
        action="append",
        help="module to leave as it is, in addition to the default (heads, routers, parts beside "
        "the language model): its path, or re: and a pattern that matches from the start of the "
        "path; may be repeated",
    )
    left_alone.add_argument(
        "--ignore-only",
        metavar="MODULE",
        action="append",
        help="like --ignore, but in place of the default; '' for no module",
    )
    add_json(parser, sys.modules[__name__])


def run(args: argparse.Namespace) -> dict[str, Any]:
    from jaxwna16.checkpoints.load import resolve_folder
    from jaxwna16.checkpoints.quantize import quantize_checkpoint
    from jaxwna16.cli.rewriting import compare

    source, destination = resolve_folder(args.source), Path(args.destination)
    started = time.perf_counter()
    quantize_checkpoint(
        source,
        destination,
        bits=args.bits,
        group_size=-1 if args.group_size == _CHANNEL else args.group_size,
        symmetric=args.symmetric,
        ignore=args.ignore or (),
        ignore_only=None if args.ignore_only is None else filter(None, args.ignore_only),
        dtype=args.dtype,
        follow_links=args.follow_links,
    )
    seconds = time.perf_counter() - started
    return compare(source, destination, seconds, follow_links=args.follow_links) | {
        "bits": args.bits,
        "group_size": args.group_size,
        "symmetric": args.symmetric,
    }


def show(report: dict[str, Any], console: Console) -> None:
    from jaxwna16.cli.rewriting import show_sizes
    from jaxwna16.cli.screen import count

    size, symmetry = report["group_size"], "symmetric" if report["symmetric"] else "asymmetric"
    groups = "one group per channel" if size == _CHANNEL else f"groups of {size}"
    console.print(
        f"{count(report['modules'], 'module')} in {report['bits']} bits, {groups}, {symmetry}"
    )
    show_sizes(report, console)


def _read_group_size(text: str) -> int | str:
    if text == _CHANNEL:
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f'expected a number above 0 or "{_CHANNEL}", got {text!r}')
