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


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint and how it is computed with."""
    parser.add_argument("checkpoint", metavar="DIR", help="checkpoint folder, or a name on the hub")
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


def add_rewrite(parser: argparse.ArgumentParser, source: str) -> None:
    """Add where a checkpoint is read and where the new one is made."""
    parser.add_argument("source", metavar="SRC", help=f"{source}: a folder, or a name on the hub")
    parser.add_argument("destination", metavar="DST", help="folder to make; it must not exist")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="cast every float tensor; by default none is"
    )
