"""`jaxwna16 eval perplexity` and `eval compare`: how well models predict a text."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from jaxwna16.cli import compare
from jaxwna16.cli.arguments import add_json, add_model, add_windows

if TYPE_CHECKING:
    from rich.console import Console

    from jaxwna16.evaluation.perplexity import Perplexity
    from jaxwna16.generation.text import Tokenizer


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure how good a model is."
    measures = parser.add_subparsers(title="measures", metavar="MEASURE", required=True)
    perplexity = measures.add_parser("perplexity", help="how well it predicts a text")
    perplexity.description = (
        "Measure perplexity. The text is cut into windows of tokens. Each window is read by "
        "itself, and every token except its first is scored. With --stride below --window, each "
        "token of the text is scored once, and the report also has the figures by word and byte "
        "that lm-evaluation-harness defines."
    )
    add_model(perplexity)
    add_windows(perplexity)
    add_json(perplexity, sys.modules[__name__])
    compare.configure(measures.add_parser("compare", help="several checkpoints side by side"))


def run(args: argparse.Namespace) -> dict[str, Any]:
    from jaxwna16.checkpoints.load import resolve_folder
    from jaxwna16.cli.model import open_model, read_scored_text
    from jaxwna16.evaluation.perplexity import measure_perplexity
    from jaxwna16.generation.text import Tokenizer
    from loaders.open import open_plan

    plan = open_plan(resolve_folder(args.checkpoint), follow_links=args.follow_links)
    tokenizer = Tokenizer.from_folder(plan.folder, follow_links=plan.follow_links)
    text, tokens = read_scored_text(args, tokenizer, [plan])
    model, facts = open_model(args)
    found = measure_perplexity(
        model,
        tokens,
        window=args.window,
        stride=args.stride,
        max_windows=args.windows,
        batch=args.batch,
        progress=None,
    )
    return {
        **facts,
        "text": args.text,
        "window": args.window,
        "stride": args.window if args.stride is None else args.stride,
        "windows": found.windows,
        "tokens": found.tokens,
        "perplexity": found.perplexity if math.isfinite(found.perplexity) else None,
        "nll": found.nll,
        **_relate_to_text(args, text, tokens, tokenizer, found),
        "seconds": found.seconds,
        "tokens_per_second": found.tokens_per_second,
    }


def _relate_to_text(
    args: argparse.Namespace,
    text: str,
    tokens: list[int],
    tokenizer: Tokenizer,
    found: Perplexity,
) -> dict[str, Any]:
    """The figures by word and byte; null unless every token of the text was scored."""
    import dataclasses

    from jaxwna16.evaluation.perplexity import TextPerplexity, find_prefix, relate_to_text

    names = [field.name for field in dataclasses.fields(TextPerplexity)]
    if args.stride in (None, args.window) or tokens[0] != find_prefix(tokenizer):
        return dict.fromkeys(names)
    if args.windows is not None:  # the text ends where the last window does
        ends = [end for _, end in tokenizer.backend.encode(text).offsets]
        own_prefix = len(ends) - (len(tokens) - 1)
        text = text[: max(ends[: found.tokens + own_prefix])]
    related = dataclasses.asdict(relate_to_text(-found.nll * found.tokens, text))
    return {name: value if math.isfinite(value) else None for name, value in related.items()}


def show(report: dict[str, Any], console: Console) -> None:
    from jaxwna16.cli.screen import count

    def write(value: float | None) -> str:
        return "above 1e304" if value is None else format(value, ".4f")

    console.print(f"perplexity {write(report['perplexity'])}")
    if report["words"] is not None:
        console.print(
            f"by word {write(report['word_perplexity'])} ({count(report['words'], 'word')}), "
            f"by byte {write(report['byte_perplexity'])} ({count(report['bytes'], 'byte')}), "
            f"{report['bits_per_byte']:.4f} bits per byte"
        )
    console.print(
        f"{count(report['windows'], 'window')} of {report['window']} tokens, "
        f"{count(report['tokens'], 'token')} scored in {report['seconds']:.1f} s "
        f"({report['tokens_per_second']:.0f}/s, {report['dtype']})"
    )
