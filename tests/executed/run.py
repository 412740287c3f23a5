"""Every kernel of the matrix compiled for GPUs that are not there, executed, and held to its bound.

    python -m tests.executed.run                      all; writes its part of docs/executed.md
    python -m tests.executed.run --only sm_90a gated  those whose text has all of these
    python -m tests.executed.run --large              the last blocks of large models alone
    python -m tests.executed.run --keep FILE          goes on where an earlier run stopped

For the path that the compiler needs see `tests.gpu_aot`; `make gpu-execute` sets it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import re
import sys
import time
from pathlib import Path

import jax
import numpy as np

from tests.executed.cases import ARCHS, Case, list_all, name
from tests.executed.large import LastBlock, list_last_blocks

REPORT = Path(__file__).parents[2] / "docs" / "executed.md"
_HEAD = """# The kernels, executed without a GPU

Made by `make gpu-execute`; not edited by hand. XLA compiles every kernel for a GPU that is not
there, and `tests/ptx` executes the PTX on a CPU, thread by thread. This shows that the code
computes the right numbers and keeps the rules of the PTX ISA: bounds, alignment, nothing read
before it is written or waited for, no races, no missing fence.

It does not show that NVIDIA's assembler translates PTX rightly, the weak order of memory, the bits
of approximate functions, or how tensor cores round.

Each cell: instructions executed (each by all threads that meet at it) · seconds on one CPU core ·
worst error as a part of its bound, which is that of [numerics.md](numerics.md). 0.00 of a grouping
or an expansion means every bit. Whole numbers also gave the bits of Pallas' interpreter. The shapes
are the smallest that run all of the code, with the tiles that the rules choose for a large weight;
the last blocks are of the full size.
"""


_EARLY = """† {} kernels use what `tcgen05.ld` loads before `tcgen05.wait::ld`, which the PTX ISA
forbids. XLA compiles so since jax 0.12, whatever the kernel says. In the machine code that ptxas
13.5 makes, the first use waits for the load, so the numbers are right. They are checked, too."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of a case.

    Attributes:
      fault: "" where all is right.
      early: whether loads of tensor memory are read before their wait.
    """

    arch: str
    case: str
    steps: int
    seconds: float
    worst: float
    fault: str = ""
    early: bool = False


def execute(case: Case | LastBlock) -> Finding:
    """Compile one case, execute it, and compare."""
    start = time.process_time()
    try:
        work = case.prepare()
        launch = work.compile(case.arch)
        start = time.process_time()
        outputs, steps, early = work.run_noting_early(launch)
        seconds = time.process_time() - start
        worst = work.measure(outputs)
        fault = "" if worst <= 1 else "wrong numbers"
        if getattr(case, "whole", False) and not _is_interpreted(work, outputs):
            fault = "not the bits of the interpreted kernel"
        return Finding(case.arch, name(case), steps, seconds, worst, fault, early)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
        return Finding(case.arch, name(case), 0, time.process_time() - start, np.inf, fault)


def _is_interpreted(work, outputs: list[np.ndarray]) -> bool:
    pairs = zip(outputs, work.interpret(), strict=True)
    return all(np.array_equal(work.take(a), work.take(b)) for a, b in pairs)


def write_section(findings: list[Finding], wanted: int) -> str:
    """The table of one version of jax, in Markdown; `wanted`: how many a whole run has."""
    lines = [f"## jax {jax.__version__}", ""]
    faulty = [f for f in findings if f.fault]
    lines += [f"{len(findings)} of {wanted} kernels executed, {len(faulty)} faulty.", ""]
    if early := sum(f.early for f in findings):
        lines += [_EARLY.format(early), ""]
    lines += [f"- {f.arch} {f.case}: {f.fault}" for f in faulty] + [""] * bool(faulty)
    rows: dict[str, dict[str, str]] = {}
    for finding in findings:
        rows.setdefault(finding.case, {})[finding.arch] = _write_cell(finding)
    lines += [f"| case | {' | '.join(ARCHS)} |", f"| --- |{' --- |' * len(ARCHS)}"]
    for label, cells in rows.items():
        lines.append(f"| {label} | {' | '.join(cells.get(arch, '') for arch in ARCHS)} |")
    return "\n".join(lines) + "\n"


def _write_cell(finding: Finding) -> str:
    if finding.fault:
        return "**fault**"
    cell = f"{finding.steps:,} · {finding.seconds:.1f} · {finding.worst:.2f}"
    return f"{cell} †" if finding.early else cell


def merge(report: str, section: str) -> str:
    """Put the section of a version of jax into the report, in place of the one before."""
    parts = re.split(r"(?m)^(?=## jax )", report or _HEAD)
    title = section.splitlines()[0]
    kept = [part.rstrip() + "\n" for part in parts[1:] if part.splitlines()[0] != title]
    versions = sorted([*kept, section], key=lambda part: [*map(int, re.findall(r"\d+", part)[:3])])
    return "\n".join([_HEAD, *versions])


def read_findings(path: Path | None) -> dict[tuple[str, str], Finding]:
    """What an earlier run wrote, by architecture and case."""
    if path is None or not path.exists():
        return {}
    findings = (Finding(**json.loads(line)) for line in path.read_text().splitlines())
    return {(finding.arch, finding.case): finding for finding in findings}


def main() -> int:
    parser = argparse.ArgumentParser(description="Execute the kernels' machine code on a CPU.")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="fewer cases")
    parser.add_argument("--large", action="store_true", help="last blocks of large models alone")
    parser.add_argument("--workers", type=int, metavar="N", help="processes, one for each core")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="of findings, one a line")
    options = parser.parse_args()
    cases = [*([] if options.large else list_all()), *list_last_blocks()]
    cases = [c for c in cases if all(text in f"{c.arch} {name(c)}" for text in options.only)]
    found = read_findings(options.keep)
    wanted = [case for case in cases if (case.arch, name(case)) not in found]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, context) as pool:
        for finding in pool.map(execute, wanted):
            found[finding.arch, finding.case] = finding
            what = finding.fault or f"{finding.worst:.2f} of the bound"
            print(f"{finding.arch} {finding.case}: {what}", file=sys.stderr, flush=True)
            if options.keep:
                with options.keep.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(finding)) + "\n")
    findings = [found[case.arch, name(case)] for case in cases]
    if not (options.only or options.large):
        old = REPORT.read_text() if REPORT.exists() else ""
        REPORT.write_text(merge(old, write_section(findings, len(cases))))
    return int(any(finding.fault for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
