"""The command `jaxwna16 VERB`: reads the call, runs the verb, prints its report.

Each verb is a module with three functions: `configure(parser)` adds its arguments, `run(args)`
does the work and returns a plain dict, `show(report, console)` prints that dict for people. With
`--json` the dict itself is printed. A report on a faulty input says so under "error"; a verb whose
report can hold failures of other kinds has `judge(report)`, which gives the exit code. What a verb
needs beyond the standard library is imported in `run` and `show`, so that `--help` does not wait
for JAX.

Exit codes: 0 good, 1 the input is at fault, 2 the call is, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence

from jaxwna16.cli import (
    bench,
    convert,
    dequantize,
    doctor,
    evaluate,
    generate,
    harness,
    inspect,
    quantize,
    verify,
)

_DESCRIPTION = "Packed WNA16 checkpoints (compressed-tensors pack-quantized) in JAX."
_EPILOG = "`jaxwna16 VERB --help` explains a verb. Exit codes: 0 good, 1 bad input, 2 bad call."
_INTERRUPTED = 130
_PIPE_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; `argv` None is the process's own arguments."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal cannot write must not end us
            stream.reconfigure(errors="backslashreplace")
    try:
        args = _make_parser().parse_args(argv)
    except SystemExit as end:  # argparse has printed the help, or what is wrong with the call
        return int(end.code or 0)
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # the reader (`| head`) has left; the interpreter must not trip over it while closing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("jaxwna16", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("-V", "--version", action="version", version=f"jaxwna16 {_read_version()}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    inspect.configure(verbs.add_parser("inspect", help="show what a checkpoint holds"))
    verify.configure(
        verbs.add_parser("verify", help="read a checkpoint and check everything in it")
    )
    generate.configure(verbs.add_parser("generate", help="continue a prompt"))
    evaluate.configure(verbs.add_parser("eval", help="measure how good a model is"))
    # no sign begins an option here, so that every argument is left to the harness's own parser
    harness.configure(
        verbs.add_parser(
            "lm-eval", help="run lm-evaluation-harness", prefix_chars="\0", add_help=False
        )
    )
    quantize.configure(verbs.add_parser("quantize", help="make a packed checkpoint of a float one"))
    dequantize.configure(
        verbs.add_parser("dequantize", help="make a float checkpoint of a packed one")
    )
    convert.configure(verbs.add_parser("convert", help="make a copy that loads at disk speed"))
    bench.configure(verbs.add_parser("bench", help="time the kernels on this machine"))
    doctor.configure(verbs.add_parser("doctor", help="show what this machine can run"))
    return parser


def _read_version() -> str:
    from jaxwna16 import __version__

    return __version__


def _run(args: argparse.Namespace) -> int:
    from jaxwna16.cli.arguments import CallError
    from jaxwna16.cli.faults import describe_error, show_error
    from jaxwna16.cli.screen import make_console
    from pallas_kernels.errors import Wna16Error

    try:
        report = args.verb.run(args)
    except (Wna16Error, CallError) as error:
        if args.json:
            print(json.dumps({"error": describe_error(error)}, indent=2))
        show_error(describe_error(error), make_console(stderr=True))
        return 2 if isinstance(error, CallError) else 1
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        args.verb.show(report, make_console())
    sys.stdout.flush()
    if "error" in report:
        show_error(report["error"], make_console(stderr=True))
        return 1
    return args.verb.judge(report) if hasattr(args.verb, "judge") else 0
