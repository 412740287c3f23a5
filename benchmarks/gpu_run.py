"""Everything that needs a GPU, in four stages of less than 10 minutes each.

    make gpu [PYTHON=python3]        or: python benchmarks/gpu_run.py [STAGE ...]

* measure: the tests marked `gpu`, then the bench of linear layers and of experts, with every peer
  that is installed.
* tune: the tuner for both.
* again: the bench for both with the tiles that were tuned, without peers.
* models: tokens per second of whole models, with those tiles, and a profile of their decode steps;
  then Llama-3.1-8B again with the loop over tokens in the command buffer (`--graph-loop` of
  model_speed.py), in a process of its own. That may crash, which is recorded and no failure.

Without arguments all of them, in this order, the most important first; one by one where a command
may only run for minutes. A step that fails does not stop the next, and one whose time is over is
interrupted; what it had found is in its files. Needs jax with CUDA, pytest and (for the plots)
matplotlib; nothing is downloaded. All files go to $OUT, or benchmarks/results/gpu, at most 8 of a
stage:

    run-STAGE.json               commit, table, and of each step command, seconds, exit code, output
    kernels.json, .md, .png      every figure of linear layers, and the plot
    moe.json, .md, .png          likewise of experts
    tuning.json, .md             candidates and winners; moe-tuning.… likewise of experts
    nvidia-….json                a copy of the table of tiles
    tuned/                       kernels.… and moe.… again, with that table
    models.json, .md             tokens per second; MODEL.trace.json.gz are the profiles
    graph-loop/                  models.… again, with the loop in the command buffer

The table itself is in $JAXWNA16_TILES, or .cache/tiles, which git ignores: `again` and `models`
need it there. Where a later stage runs on another machine or in another copy of this tree, carry it
along, or put nvidia-….json there. Where git knows no commit, $JAXWNA16_COMMIT names it:

    JAXWNA16_COMMIT=$(git rev-parse HEAD) python benchmarks/gpu_run.py measure
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from jaxwna16.bench.machine import find_commit  # noqa: E402

STAGE_SECONDS = {"measure": 550, "tune": 330, "again": 250, "models": 320}
"""Together 25 minutes; of half an hour, starting machines and copying take the rest."""

TEST_SECONDS, PEER_SECONDS = 120, 90
STARTING_SECONDS, MOE_STARTING_SECONDS = 25, 60
"""What a step may take besides: imports, the limits, what was begun before its time was over."""

TOKENS, MOE_TOKENS = "1,16,64,128,256,1024,4096", "1,16,64,256,1024,4096"
TUNED_TOKENS, TUNED_MOE_TOKENS = "1,16,64,128,256,1024", "1,16,64,4096"
TUNED_EXPERTS = "qwen3-30b-a3b,mixtral-8x7b"
"""What the targets are about; `docs/benchmarks.md` says in which order it is tuned."""

MODELS_PART, GRAPH_LOOP_MODEL = 0.75, "Llama-3.1-8B"

_FIND_TABLE = """
import sys
from jaxwna16.bench.tune import read_tuned
from pallas_kernels.tiles.device import UNKNOWN, find_device
from pallas_kernels.tiles.tables import user_table_path

device = find_device()
if device == UNKNOWN:
    sys.exit("JAX sees no GPU: there is no table of tiles to look for")
path = user_table_path(device.kind)
if sys.argv[1] == "needed" and not path.exists():
    sys.exit(f"{path} does not exist: run the stage tune, put the table of this GPU there, or let "
             "JAXWNA16_TILES name it")
read_tuned(path, device)
print(path)
"""
_TABLE_SECONDS = 60
_LEAST_SECONDS = 5
_INTERRUPT_SECONDS = 15
_TAIL_LINES = 300


@dataclasses.dataclass(frozen=True)
class Step:
    """One command and its outcome; an exit code of None is: stopped, it took too long.

    One that is an attempt may end in any way.
    """

    name: str
    command: list[str]
    seconds: float
    exit_code: int | None
    tail: list[str]
    is_attempt: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 0 if all steps went well."""
    parser = argparse.ArgumentParser(description="tests, figures and tuned tiles on a GPU")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGE_SECONDS))
    stages = parser.parse_args(arguments).stages or list(STAGE_SECONDS)
    if unknown := [stage for stage in stages if stage not in STAGE_SECONDS]:
        parser.error(f"no stage {unknown[0]!r}: there are {', '.join(STAGE_SECONDS)}")
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # as in the background of a shell; what is started here would ignore it, too
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    failed = False
    for stage in stages:
        steps: list[Step] = []
        for step in run_stage(stage, folder, time.monotonic() + STAGE_SECONDS[stage]):
            steps.append(step)
            # after every step: whoever is stopped has those before
            write_report(folder / f"run-{stage}.json", steps)
        print_summary(folder / "tuned" if stage == "again" else folder, steps)
        failed = failed or any(step.exit_code != 0 for step in steps if not step.is_attempt)
    return int(failed)


def write_report(path: Path, steps: Sequence[Step]) -> None:
    """What ran so far, at which commit and with which table."""
    found = [step for step in steps if step.name == "table" and step.exit_code == 0]
    report = {
        "commit": find_commit(),
        "table": found[0].tail[-1] if found else None,
        "steps": [dataclasses.asdict(step) for step in steps],
    }
    path.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def run_stage(stage: str, folder: Path, end: float) -> Iterator[Step]:
    """The steps of a stage, each in its part of the time that is left."""
    tiles = Path(os.environ.get("JAXWNA16_TILES") or ROOT / ".cache" / "tiles").expanduser()
    environment = {"JAXWNA16_TILES": str(tiles.absolute())}

    def bench(name: str, part: float, *options: str, peers: int = 0) -> Step:
        seconds = part * (end - time.monotonic())
        besides = MOE_STARTING_SECONDS if "--moe" in options else STARTING_SECONDS
        inner = max(20, int(seconds - peers - besides))
        arguments = ["-m", "jaxwna16", "bench", *options, "--seconds", str(inner)]
        arguments += ["--peers", "--peer-seconds", str(peers)] if peers else []
        return run_step(name, arguments, seconds, None if stage == "measure" else environment)

    here = ["--output", str(folder)]
    dense, moe = ["--tokens", TOKENS], ["--moe", "--tokens", MOE_TOKENS]
    if stage == "measure":
        workers = ["-p", "xdist", "-n", "8"] if importlib.util.find_spec("xdist") else []
        tests = ["-m", "pytest", "-q", "--tb=short", *workers, "-m", "gpu", "tests/gpu"]
        # other plugins of this Python may warn, and warnings are errors
        yield run_step("tests", tests, TEST_SECONDS, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
        yield bench("bench", 0.42, *dense, *here, peers=PEER_SECONDS)
        yield bench("bench moe", 1.0, *moe, *here, peers=PEER_SECONDS)
        return
    if stage == "tune" and not tiles.suffix:
        tiles.mkdir(parents=True, exist_ok=True)
    needed = "made" if stage == "tune" else "needed"
    table = run_step("table", ["-c", _FIND_TABLE, needed], _TABLE_SECONDS, environment)
    yield table
    if table.exit_code != 0:
        return
    if stage == "tune":
        experts = ["--moe", TUNED_EXPERTS, "--tokens", TUNED_MOE_TOKENS]
        for name, part, options in (
            ("tune", 0.5, ["--tokens", TUNED_TOKENS]),
            ("tune moe", 1.0, experts),
        ):
            yield bench(name, part, "--tune", *options, *here)
            with contextlib.suppress(FileNotFoundError):  # nothing was found in time
                shutil.copy2(table.tail[-1], folder)
    elif stage == "again":
        again = ["--output", str(folder / "tuned")]
        yield bench("bench again", 0.45, *dense, *again)
        yield bench("bench moe again", 1.0, *moe, *again)
    else:
        speed = ["benchmarks/model_speed.py", "--batches", "1,64", "--trace", *here]
        yield run_step("models", speed, MODELS_PART * (end - time.monotonic()), environment)
        loop = ["benchmarks/model_speed.py", "--batches", "1", "--models", GRAPH_LOOP_MODEL]
        loop += ["--graph-loop", "--output", str(folder / "graph-loop")]
        tried = run_step("models, graph loop", loop, end - time.monotonic(), environment)
        yield dataclasses.replace(tried, is_attempt=True)


def run_step(
    name: str, arguments: list[str], seconds: float, environment: dict[str, str] | None = None
) -> Step:
    """Run Python with these arguments; show what it prints, and keep its last lines.

    One that takes too long is interrupted, so that it can say how far it came, and killed a little
    later with the processes it has started.
    """
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
            out, _ = process.communicate(timeout=max(_LEAST_SECONDS, seconds))
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            out, code = _stop(process), None
    print(out, flush=True)
    tail = out.splitlines()[-_TAIL_LINES:]
    return Step(name, command, round(time.monotonic() - begin, 1), code, tail)


def _stop(process: subprocess.Popen[str]) -> str:
    """Interrupt it, then kill it and what it has started; all that it has printed."""
    out = None
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        out, _ = process.communicate(timeout=_INTERRUPT_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0] if out is None else out


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
