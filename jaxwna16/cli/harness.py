"""`jaxwna16 lm-eval`: lm-evaluation-harness's own command line, with our model registered."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_COMMANDS = ("run", "ls", "validate")
_NAMING = ("--model", "--config")  # a config file of the harness names its model
_NAMING_SHORT = ("-M", "-C")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run lm-evaluation-harness; all arguments are its own."
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(verb=sys.modules[__name__], json=False)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Hand over to the harness, which prints its tables and writes its files itself."""
    from jaxwna16.extras import import_extra
    from jaxwna16.programs import keep_programs

    keep_programs()
    command: Any = import_extra("lm_eval.__main__", "eval")
    importlib.import_module("jaxwna16.evaluation.lm_eval.model")  # registers the model
    before = sys.argv
    sys.argv = ["jaxwna16 lm-eval", *_complete(args.arguments)]
    try:
        command.cli_evaluate()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return {"exit_code": 1}
        return {"exit_code": end.code or 0}
    finally:
        sys.argv = before
    return {"exit_code": 0}


def _complete(arguments: list[str]) -> list[str]:
    """Add the command `run` and our model if the call names none."""
    command, rest = "run", arguments
    if arguments and arguments[0] in _COMMANDS:
        command, *rest = arguments
    names_model = any(
        argument.split("=")[0] in _NAMING or argument.startswith(_NAMING_SHORT) for argument in rest
    )
    return [command, *([] if names_model or command != "run" else ["--model", "jaxwna16"]), *rest]


def show(report: dict[str, Any], console: Console) -> None:
    """Nothing: the harness has shown its results."""


def judge(report: dict[str, Any]) -> int:
    return report["exit_code"]
