"""`jaxwna16 eval perplexity`: how well a model predicts a text."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from jaxwna16.cli.arguments import add_json, add_model

if TYPE_CHECKING:
    from rich.console import Console


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure how good a model is."
    measures = parser.add_subparsers(title="measures", metavar="MEASURE", required=True)
    perplexity = measures.add_parser("perplexity", help="how well it predicts a text")
    perplexity.description = (
        "Measure perplexity: the text is cut into windows of tokens that do not overlap, each is "
        "read by itself, and every token but its first is scored."
    )
    add_model(perplexity)
    perplexity.add_argument("--text", metavar="FILE", required=True, help="UTF-8 text")
    perplexity.add_argument(
        "--window", metavar="T", type=int, default=512, help="tokens of a window (default: 512)"
    )
    perplexity.add_argument(
        "--windows",
        metavar="N",
        type=int,
        help="score only the first N windows of the text's second half, which begins at its middle "
        "character; by default the whole text is scored",
    )
    perplexity.add_argument(
        "--batch", metavar="B", type=int, default=1, help="windows scored at once (default: 1)"
    )
    add_json(perplexity, sys.modules[__name__])


def run(args: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from jaxwna16.cli.model import open_model, open_tokenizer
    from jaxwna16.cli.screen import count, make_console
    from jaxwna16.errors import InputError
    from jaxwna16.evaluation import cut_windows, measure_perplexity, read_text

    text = read_text(args.text)
    if args.windows is not None:
        text = text[len(text) // 2 :]
    tokens = np.asarray(open_tokenizer(args).encode(text))
    windows = len(cut_windows(tokens, args.window, args.windows))
    if args.windows is not None and windows < args.windows:
        raise InputError(
            f"{args.text}: its second half has {windows} windows of {args.window} tokens, not "
            f"{args.windows}: ask for fewer (--windows), for smaller ones (--window) or leave out "
            "--windows to score the whole text"
        )
    model, facts = open_model(args)
    with make_console(stderr=True).status(f"scoring {count(windows, 'window')}"):
        found = measure_perplexity(
            model, tokens, window=args.window, max_windows=args.windows, batch=args.batch
        )
    return {
        **facts,
        "text": args.text,
        "window": args.window,
        "windows": found.windows,
        "tokens": found.tokens,
        "perplexity": found.perplexity if math.isfinite(found.perplexity) else None,
        "nll": found.nll,
        "seconds": found.seconds,
        "tokens_per_second": found.tokens_per_second,
    }


def show(report: dict[str, Any], console: Console) -> None:
    from jaxwna16.cli.screen import count

    value = report["perplexity"]
    console.print(f"perplexity {'above 1e304' if value is None else format(value, '.4f')}")
    console.print(
        f"{count(report['windows'], 'window')} of {report['window']} tokens, "
        f"{count(report['tokens'], 'token')} scored in {report['seconds']:.1f} s "
        f"({report['tokens_per_second']:.0f}/s, {report['dtype']})"
    )
