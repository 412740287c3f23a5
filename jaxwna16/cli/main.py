"""The command `jaxwna16 VERB`: reads the call, runs the verb, prints its report.

Each verb is a module with three functions: `configure(parser)` adds its arguments, `run(args)`
does the work and returns a plain dict, `show(report, console)` prints that dict for people. With
`--json` the dict itself is printed. A report on a faulty input says so under "error"; a verb whose
report can hold failures of other kinds has `judge(report)`, which gives the exit code. What a verb
needs beyond the standard library is imported in `run` and `show`, so that `--help` does not wait
for JAX. This module imports nothing of this package until `main` runs, so that an interrupt during
an import ends the process without a traceback (`_interruptible_imports`).

Exit codes: 0 good, 1 the input is at fault, 2 the call is, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

_DESCRIPTION = "Packed WNA16 checkpoints (compressed-tensors pack-quantized) in JAX."
_EPILOG = "`jaxwna16 VERB --help` explains a verb. Exit codes: 0 good, 1 bad input, 2 bad call."
_INTERRUPTED = 130
_PIPE_CLOSED = 141
_IMPORTING = "<frozen importlib._bootstrap>"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; `argv` None means the process's own arguments."""
    with _interruptible_imports():
        try:
            return _call(argv)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return _INTERRUPTED
        except BrokenPipeError:
            # the reader (`| head`) has left; the interpreter must not trip over it while closing
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _PIPE_CLOSED


@contextmanager
def _interruptible_imports() -> Iterator[None]:
    """Within this context, SIGINT during the import of a module ends the process at once.

    An exception may not get out of an import: libraries catch it, or Python prints and ignores it.
    During an import no work is half done, so nothing has to be cleaned up.
    """
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if is_ours:  # else somebody has decided what an interrupt does
            signal.signal(signal.SIGINT, _interrupt)
    except ValueError:  # not the main thread, which alone gets signals
        is_ours = False
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename == _IMPORTING:
            os.write(2, b"interrupted\n")
            os._exit(_INTERRUPTED)
        caller = caller.f_back
    signal.default_int_handler(number, frame)


def _call(argv: Sequence[str] | None) -> int:
    import io

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # unencodable characters must not end us
            stream.reconfigure(errors="backslashreplace")
    try:
        args = _make_parser().parse_args(argv)
    except SystemExit as end:  # argparse has printed the help, or what is wrong with the call
        return int(end.code or 0)
    return _run(args)


def _make_parser() -> argparse.ArgumentParser:
    import argparse

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

    parser = argparse.ArgumentParser("jaxwna16", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("-V", "--version", action="version", version=f"jaxwna16 {_read_version()}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    inspect.configure(verbs.add_parser("inspect", help="show what a checkpoint holds"))
    verify.configure(
        verbs.add_parser("verify", help="read a checkpoint and check everything in it")
    )
    generate.configure(verbs.add_parser("generate", help="continue a prompt"))
    evaluate.configure(verbs.add_parser("eval", help="measure how good a model is"))
    # no character begins an option here, so that the harness's own parser gets every argument
    harness.configure(
        verbs.add_parser(
            "lm-eval", help="run lm-evaluation-harness", prefix_chars="\0", add_help=False
        )
    )
    quantize.configure(
        verbs.add_parser("quantize", help="make a packed checkpoint from a float one")
    )
    dequantize.configure(
        verbs.add_parser("dequantize", help="make a float checkpoint from a packed one")
    )
    convert.configure(verbs.add_parser("convert", help="make a copy that loads at disk speed"))
    bench.configure(verbs.add_parser("bench", help="time the kernels on this machine"))
    doctor.configure(verbs.add_parser("doctor", help="show what this machine can run"))
    return parser


def _read_version() -> str:
    from jaxwna16.version import __version__

    return __version__


def _run(args: argparse.Namespace) -> int:
    from jaxwna16.cli.arguments import CallError
    from jaxwna16.cli.faults import describe_error, show_error
    from jaxwna16.cli.json_report import write_report
    from jaxwna16.cli.screen import make_console
    from pallas_kernels.errors import Wna16Error

    try:
        report = args.verb.run(args)
    except (Wna16Error, CallError) as error:
        if args.json:
            print(write_report({"error": describe_error(error)}))
        show_error(describe_error(error), make_console(stderr=True))
        return 2 if isinstance(error, CallError) else 1
    if args.json:
        print(write_report(report))
    else:
        args.verb.show(report, make_console())
    sys.stdout.flush()
    if "error" in report:
        show_error(report["error"], make_console(stderr=True))
        return 1
    return args.verb.judge(report) if hasattr(args.verb, "judge") else 0
