"""Arguments that several verbs share."""

from __future__ import annotations

import argparse

DTYPES = ("float32", "bfloat16", "float16")


class CallError(ValueError):
    """The options contradict each other, or this machine cannot run them: exit code 2."""


def add_json(parser: argparse.ArgumentParser, verb: object) -> None:
    """Add `--json`, and set the module that runs this verb."""
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON (docs/cli.md)"
    )
    parser.set_defaults(verb=verb)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint and `--follow-links`."""
    parser.add_argument("checkpoint", metavar="DIR", help="checkpoint folder, or a name on the hub")
    add_links(parser)


def add_links(parser: argparse.ArgumentParser) -> None:
    """Add `--follow-links`."""
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="also read files that are links out of the checkpoint's folder",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, and the options for computing with it."""
    add_checkpoint(parser)
    add_computation(parser)


def add_computation(parser: argparse.ArgumentParser) -> None:
    """Add the dtype and the backend of a model."""
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="dtype of activations and of tensors that are not quantized; auto (the default) is "
        "float32 on a CPU, and the checkpoint's own dtype elsewhere",
    )
    parser.add_argument(
        "--backend",
        choices=("triton", "xla"),
        help="backend of the quantized layers; default: the best one on this machine",
    )


def add_windows(parser: argparse.ArgumentParser) -> None:
    """Add a text, and the options for the windows that score it."""
    parser.add_argument("--text", metavar="FILE", required=True, help="UTF-8 text")
    parser.add_argument(
        "--window", metavar="T", type=int, default=512, help="tokens per window (default: 512)"
    )
    parser.add_argument(
        "--stride",
        metavar="T",
        type=int,
        help="tokens from the start of one window to the start of the next (default: --window); "
        "below --window the windows overlap, and every token of the text is scored once",
    )
    parser.add_argument(
        "--windows",
        metavar="N",
        type=int,
        help="score only the first N windows of the text's second half, which begins at its middle "
        "character; default: score the whole text",
    )
    parser.add_argument(
        "--batch", metavar="B", type=int, default=1, help="windows scored at once (default: 1)"
    )


def add_rewrite(parser: argparse.ArgumentParser, source: str) -> None:
    """Add the source checkpoint, the new folder and the dtype."""
    parser.add_argument("source", metavar="SRC", help=f"{source}: a folder, or a name on the hub")
    parser.add_argument("destination", metavar="DST", help="new folder; it must not exist")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="cast every float tensor to this dtype; default: no cast"
    )
    add_links(parser)
