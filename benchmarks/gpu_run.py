"""Everything that needs a GPU, in under 8 minutes: tests, tuned tiles, figures.

    make gpu [PYTHON=python3]        or: python benchmarks/gpu_run.py

Runs the tests marked `gpu`, then the tuner, then the bench with every peer that is installed. A
step that fails does not stop the next. Needs jax with CUDA, pytest and (for the plot) matplotlib;
nothing is downloaded. All files go to $OUT, or benchmarks/results/gpu:

    run.json                     what each step did: command, seconds, exit code, last lines
    tuning.json, .md             candidates and winners; nvidia-….json is the table itself
    kernels.json, .md            every figure; .png and .svg are the plot
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

TOTAL_SECONDS = 455
TEST_SECONDS, TUNING_SECONDS, PEER_SECONDS = 110, 110, 80
STARTING_SECONDS = 25
"""What a step may take besides: imports, the limits, its last case."""

_TAIL_LINES = 15


@dataclasses.dataclass(frozen=True)
class Step:
    """One command and its outcome; an exit code of None is: stopped, it took too long."""

    name: str
    command: list[str]
    seconds: float
    exit_code: int | None
    tail: list[str]


def main() -> int:
    """Run the steps; 0 if all of them went well."""
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    steps = run_steps(folder, time.monotonic() + TOTAL_SECONDS)
    report = {"steps": [dataclasses.asdict(step) for step in steps]}
    (folder / "run.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print_summary(folder, steps)
    return int(any(step.exit_code != 0 for step in steps))


def run_steps(folder: Path, end: float) -> list[Step]:
    """Tests, tuner, bench, each in the time it has."""
    # so that the bench finds what the tuner wrote
    environment = {"JAXWNA16_TILES": str(folder)}
    bench = ["-m", "jaxwna16", "bench", "--output", str(folder)]
    steps = [run_step("tests", ["-m", "pytest", "-q", "-m", "gpu", "tests/gpu"], TEST_SECONDS)]
    tune = [*bench, "--tune", "--seconds", str(TUNING_SECONDS)]
    steps.append(run_step("tune", tune, TUNING_SECONDS + STARTING_SECONDS, environment))
    left = end - time.monotonic()
    seconds = max(30, int(left - PEER_SECONDS - STARTING_SECONDS))
    peers = ["--peers", "--peer-seconds", str(PEER_SECONDS)]
    steps.append(run_step("bench", [*bench, *peers, "--seconds", str(seconds)], left, environment))
    return steps


def run_step(
    name: str, arguments: list[str], seconds: float, environment: dict[str, str] | None = None
) -> Step:
    """Run Python with these arguments; show what it prints, and keep its last lines."""
    command = [sys.executable, *arguments]
    print(f"== {name}: {' '.join(command)}", flush=True)
    begin = time.monotonic()
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, **(environment or {})}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            out, _ = process.communicate(timeout=max(5.0, seconds))
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes it has started
            out, _ = process.communicate()
            code = None
    print(out, flush=True)
    tail = out.splitlines()[-_TAIL_LINES:]
    return Step(name, command, round(time.monotonic() - begin, 1), code, tail)


def print_summary(folder: Path, steps: list[Step]) -> None:
    """The targets that were measured, then one line a step."""
    with contextlib.suppress(FileNotFoundError):
        from jaxwna16.bench.report import tabulate_targets

        result: dict[str, Any] = json.loads((folder / "kernels.json").read_text("utf-8"))
        cells = [row[:6] for row in tabulate_targets(result["rows"])]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))
    for step in steps:
        outcome = {None: "took too long", 0: "good"}.get(
            step.exit_code, f"failed ({step.exit_code})"
        )
        print(f"{step.name}: {outcome}, {step.seconds:.0f} s")
    print(f"results in {folder}")


if __name__ == "__main__":
    sys.exit(main())
