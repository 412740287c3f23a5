"""`jaxwna16 eval compare`: several checkpoints of one vocabulary side by side."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Any

from jaxwna16.cli.arguments import add_computation, add_json, add_links, add_windows

if TYPE_CHECKING:
    from rich.console import Console


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare checkpoints of one vocabulary on a text: bytes, perplexity, distance from the "
        "first checkpoint (KL divergence, agreement of the most likely token), tokens per second. "
        "Two models are in memory at once: the first and the one that is compared with it."
    )
    parser.add_argument(
        "checkpoints",
        metavar="DIR",
        nargs="+",
        help="checkpoint folders, or names on the hub; the first is the reference",
    )
    add_links(parser)
    add_computation(parser)
    add_windows(parser)
    parser.add_argument(
        "--plot", metavar="FILE", help="draw quality against bytes (.png, .svg or .pdf)"
    )
    add_json(parser, sys.modules[__name__])


def run(args: argparse.Namespace) -> dict[str, Any]:
    from jaxwna16.cli.faults import describe_error
    from jaxwna16.cli.model import read_scored_text
    from jaxwna16.dtypes import choose_dtype
    from jaxwna16.errors import InputError
    from jaxwna16.evaluation.comparison import compare_checkpoints, open_plans
    from jaxwna16.evaluation.comparison_plot import check_target, draw
    from jaxwna16.evaluation.perplexity import read_text
    from jaxwna16.generation.text import Tokenizer
    from jaxwna16.programs import keep_programs

    if args.plot is not None:
        check_target(args.plot)
    keep_programs()
    plans = open_plans(args.checkpoints, read_text(args.text), follow_links=args.follow_links)
    tokenizer = Tokenizer.from_folder(plans[0].folder, follow_links=args.follow_links)
    _, tokens = read_scored_text(args, tokenizer, plans)
    compared = compare_checkpoints(
        plans,
        tokens,
        dtype=choose_dtype(args.dtype),
        backend=args.backend,
        window=args.window,
        stride=args.stride,
        max_windows=args.windows,
        batch=args.batch,
        progress=None,
    )
    rows = [dataclasses.asdict(row) for row in compared]
    for row in rows:
        if not math.isfinite(row["perplexity"]):
            row["perplexity"] = None
    report = {
        "backend": args.backend,
        "text": args.text,
        "window": args.window,
        "stride": args.window if args.stride is None else args.stride,
        "rows": rows,
        "plot": args.plot,
    }
    if args.plot is not None:
        try:
            draw(rows, args.plot)
        except InputError as error:  # the figures took long to make, so they are reported
            report |= {"plot": None, "error": describe_error(error)}
    return report


def show(report: dict[str, Any], console: Console) -> None:
    from jaxwna16.cli.screen import make_table
    from loaders.errors import escape_line

    numbers = ("MB", "perplexity", "KL to first", "same top-1", "tokens/s")
    table = make_table("checkpoint", "weights", *numbers, numbers=numbers)
    for row in report["rows"]:
        value = row["perplexity"]
        table.add_row(
            escape_line(row["name"]),
            row["scheme"],
            f"{row['bytes'] / 1e6:.1f}",
            "above 1e304" if value is None else f"{value:.2f}",
            f"{row['kl_divergence']:.4f}",
            f"{row['top1_agreement']:.1%}",
            f"{row['tokens_per_second']:.0f}",
        )
    console.print(table)
    if report["plot"] is not None:
        console.print(f"plot: {escape_line(report['plot'])}")
