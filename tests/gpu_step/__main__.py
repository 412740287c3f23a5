"""Compiles the product's programs for GPUs that are not there, and writes docs/step.md.

    python -m tests.gpu_step                          every program; writes docs/step.md
    python -m tests.gpu_step --only Llama sm_90a      those whose name has all of these; prints them
    python -m tests.gpu_step --only Llama --layers 8  more layers than one period of the pattern
    python -m tests.gpu_step --all-layers             also each whole model, at batch 1 on sm_90a
    python -m tests.gpu_step --core --json            the few that the tests hold, as JSON
    python -m tests.gpu_step --keep FILE              goes on where an earlier run stopped

Each program is compiled in a process of its own, with a time limit. For the path that the compiler
needs see `tests.gpu_aot`; `make gpu-step` sets it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from tests.gpu_step.cases import LAYERS, list_core, list_programs
from tests.gpu_step.readings import Program, Reading, from_json, to_json

SECONDS = 900
_MARK = "READING "


def compile_apart(program: Program, seconds: float) -> Reading | str:
    """In a process of its own, whose memory is free again; the reason if there is no reading."""
    command = [sys.executable, "-m", "tests.gpu_step", "--one", to_json(program)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not compiled in {seconds:.0f} s"
    found = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not found:
        return f"exit code {done.returncode}: {done.stderr[-1500:]}"
    return from_json(Reading, found[-1].removeprefix(_MARK))


def run(
    programs: list[Program], seconds: float, keep: Path | None
) -> Iterator[tuple[Program, Reading | str]]:
    """Compile what was not kept of an earlier run, one after the other."""
    known = {}
    if keep and keep.exists():
        for line in keep.read_text().splitlines():
            reading = from_json(Reading, line)
            known[str(reading.program)] = reading
    for program in programs:
        result = known.get(str(program)) or compile_apart(program, seconds)
        if keep and isinstance(result, Reading) and str(program) not in known:
            with keep.open("a") as file:
                file.write(to_json(result) + "\n")
        yield program, result


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the step's programs and read them.")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="fewer programs")
    parser.add_argument("--core", action="store_true", help="only those that the tests hold")
    parser.add_argument("--layers", type=int, default=LAYERS, metavar="N")
    parser.add_argument("--all-layers", action="store_true", help="whole models, too")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each program")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="of readings, one a line")
    parser.add_argument("--json", action="store_true", help="print the readings, write no report")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        from tests.gpu_step.programs import compile_program

        print(_MARK + to_json(compile_program(from_json(Program, options.one))))
        return 0
    from tests.gpu_step.budgets import find_faults
    from tests.gpu_step.report import REPORT, list_kernels_of, write_report

    programs = list_programs(options.layers, whole=options.all_layers)
    programs = list_core() if options.core else programs
    programs = [p for p in programs if all(text in f"{p} " for text in options.only)]
    results, failed = [], False
    for program, result in run(programs, options.seconds, options.keep):
        results.append((program, result))
        faults = [result] if isinstance(result, str) else find_faults(result)
        failed = failed or bool(faults)
        print(f"{program}: {'; '.join(faults) or 'good'}", file=sys.stderr, flush=True)
        if (options.only or options.core) and not options.json and isinstance(result, Reading):
            print("\n".join(list_kernels_of(result)), flush=True)
    if options.json:
        print(json.dumps([json.loads(to_json(r)) for _, r in results if isinstance(r, Reading)]))
    elif not (options.only or options.core):
        REPORT.write_text(write_report(results, version("jax")), "utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
