"""Arguments that several verbs share."""

from __future__ import annotations

import argparse

DTYPES = ("float32", "bfloat16", "float16")


class CallError(ValueError):
    """The command's options contradict each other or this machine: exit code 2."""


def add_json(parser: argparse.ArgumentParser, verb: object) -> None:
    """Add `--json`, and say which module runs this verb."""
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON (docs/cli.md)"
    )
    parser.set_defaults(verb=verb)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint."""
    parser.add_argument("checkpoint", metavar="DIR", help="checkpoint folder, or a name on the hub")
    add_links(parser)


def add_links(parser: argparse.ArgumentParser) -> None:
    """Add whether links that leave a checkpoint's folder are followed."""
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="read files also where they are links that leave the folder",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint and how it is computed with."""
    add_checkpoint(parser)
    add_computation(parser)


def add_computation(parser: argparse.ArgumentParser) -> None:
    """Add how a model is computed with."""
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of activations and of all that is not quantized; auto (the default) is float32 on a "
        "CPU, the checkpoint's own elsewhere",
    )
    parser.add_argument(
        "--backend",
        choices=("triton", "xla"),
        help="of the quantized layers; without it the best that this machine has",
    )


def add_windows(parser: argparse.ArgumentParser) -> None:
    """Add a text, and the windows in which it is scored."""
    parser.add_argument("--text", metavar="FILE", required=True, help="UTF-8 text")
    parser.add_argument(
        "--window", metavar="T", type=int, default=512, help="tokens of a window (default: 512)"
    )
    parser.add_argument(
        "--stride",
        metavar="T",
        type=int,
        help="tokens from one window's beginning to the next one's (default: --window); below "
        "--window they overlap, and every token of the text is scored once",
    )
    parser.add_argument(
        "--windows",
        metavar="N",
        type=int,
        help="score only the first N windows of the text's second half, which begins at its middle "
        "character; by default the whole text is scored",
    )
    parser.add_argument(
        "--batch", metavar="B", type=int, default=1, help="windows scored at once (default: 1)"
    )


def add_rewrite(parser: argparse.ArgumentParser, source: str) -> None:
    """Add where a checkpoint is read and where the new one is made."""
    parser.add_argument("source", metavar="SRC", help=f"{source}: a folder, or a name on the hub")
    parser.add_argument("destination", metavar="DST", help="folder to make; it must not exist")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="cast every float tensor; by default none is"
    )
    add_links(parser)
