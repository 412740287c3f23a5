"""Everything that needs a GPU, in four stages of less than 10 minutes each.

    make gpu [PYTHON=python3]        or: python benchmarks/gpu_run.py [STAGE ...]

* measure: the tests marked `gpu`, then the bench of linear layers and of experts, with every peer
  that is installed.
* tune: the tuner for both.
* again: the bench for both with the tiles that were tuned, without peers.
* models: tokens per second of whole models, with those tiles, and a profile of their decode steps.

Without arguments all of them, in this order, the most important first; one by one where a command
may only run for minutes. A step that fails does not stop the next. Needs jax with CUDA, pytest and
(for the plots) matplotlib; nothing is downloaded. All files go to $OUT, or benchmarks/results/gpu:

    run-STAGE.json               what each step did: command, seconds, exit code, last lines
    kernels.json, .md            every figure of linear layers; .png and .svg are the plot
    moe.json, .md                likewise of experts
    tuning.json, .md             candidates and winners; moe-tuning.… likewise of experts
    nvidia-….json                the table of tiles
    tuned/                       kernels.… and moe.… again, with that table
    models.json, .md             tokens per second; trace/ are the profiles
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

STAGE_SECONDS = {"measure": 540, "tune": 420, "again": 360, "models": 380}
TEST_SECONDS, PEER_SECONDS, MOE_PEER_SECONDS = 120, 60, 100
STARTING_SECONDS, MOE_STARTING_SECONDS = 25, 60
"""What a step may take besides: imports, the limits, what was begun before its time was over."""

_TAIL_LINES = 15


@dataclasses.dataclass(frozen=True)
class Step:
    """One command and its outcome; an exit code of None is: stopped, it took too long."""

    name: str
    command: list[str]
    seconds: float
    exit_code: int | None
    tail: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 0 if all steps went well."""
    parser = argparse.ArgumentParser(description="tests, figures and tuned tiles on a GPU")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGE_SECONDS))
    stages = parser.parse_args(arguments).stages or list(STAGE_SECONDS)
    if unknown := [stage for stage in stages if stage not in STAGE_SECONDS]:
        parser.error(f"no stage {unknown[0]!r}: there are {', '.join(STAGE_SECONDS)}")
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for stage in stages:
        steps = run_stage(stage, folder, time.monotonic() + STAGE_SECONDS[stage])
        report = {"steps": [dataclasses.asdict(step) for step in steps]}
        (folder / f"run-{stage}.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        print_summary(folder / "tuned" if stage == "again" else folder, steps)
        failed = failed or any(step.exit_code != 0 for step in steps)
    return int(failed)


def run_stage(stage: str, folder: Path, end: float) -> list[Step]:
    """The steps of a stage, each in its part of the time that is left."""

    def bench(name: str, part: float, *options: str, peers: int = 0, tuned: bool = True) -> Step:
        seconds = part * (end - time.monotonic())
        besides = MOE_STARTING_SECONDS if "--moe" in options else STARTING_SECONDS
        inner = max(20, int(seconds - peers - besides))
        arguments = ["-m", "jaxwna16", "bench", *options, "--seconds", str(inner)]
        arguments += ["--peers", "--peer-seconds", str(peers)] if peers else []
        # so that the table is written here, and found by those who come after
        environment = {"JAXWNA16_TILES": str(folder)} if tuned else None
        return run_step(name, arguments, seconds, environment)

    here, again = ["--output", str(folder)], ["--output", str(folder / "tuned")]
    if stage == "measure":
        tests = run_step("tests", ["-m", "pytest", "-q", "-m", "gpu", "tests/gpu"], TEST_SECONDS)
        dense = bench("bench", 0.4, *here, peers=PEER_SECONDS, tuned=False)
        moe = bench("bench moe", 1.0, "--moe", *here, peers=MOE_PEER_SECONDS, tuned=False)
        return [tests, dense, moe]
    if stage == "tune":
        return [
            bench("tune", 0.45, "--tune", *here),
            bench("tune moe", 1, "--tune", "--moe", *here),
        ]
    if stage == "models":
        speed = ["benchmarks/model_speed.py", "--output", str(folder), "--trace"]
        tiles = {"JAXWNA16_TILES": str(folder)}
        return [run_step("models", [*speed, str(folder / "trace")], end - time.monotonic(), tiles)]
    return [bench("bench again", 0.45, *again), bench("bench moe again", 1, "--moe", *again)]


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
    rows: list[Any] = []
    for name in ("kernels", "moe"):
        with contextlib.suppress(FileNotFoundError):
            rows += json.loads((folder / f"{name}.json").read_text("utf-8"))["rows"]
    if rows:
        from jaxwna16.bench.report import tabulate_targets

        cells = [row[:6] for row in tabulate_targets(rows)]
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
