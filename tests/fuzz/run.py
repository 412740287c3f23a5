"""Mutation fuzzing of the loader: many mutants, and a table of what became of them.

    python -m tests.fuzz.run                     20,000 mutants; writes docs/reliability.md
    python -m tests.fuzz.run --mutants 500       fewer, and writes nothing
    python -m tests.fuzz.run --seed 7            the same ones again

The exit code is 1 if a mutant broke the promise; it is printed, made as small as possible.
"""

from __future__ import annotations

import argparse
import platform
import re
import secrets
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from tests.fault_kinds import TITLES
from tests.fuzz.bases import make_bases
from tests.fuzz.check import MAX_BYTES, SECONDS
from tests.fuzz.generate import Tally, run
from tests.fuzz.mutations import MUTATIONS

REPORT = Path(__file__).parents[2] / "docs" / "reliability.md"
_NIGHTLY = 20_000
_SPARE = 1.3
"""Some mutants come out alike, and are counted once."""


def main() -> int:
    """Run everything and print, or write, the report; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mutants", type=int, default=_NIGHTLY)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    warnings.simplefilter("error")
    start, tallies, failed = time.perf_counter(), {}, []
    each = round(args.mutants * _SPARE / len(MUTATIONS))
    for mutation in MUTATIONS:
        try:
            tallies[mutation] = run(mutation, each, args.seed)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failed.append(mutation)
            traceback.print_exc()
            print(*getattr(error, "__notes__", ()), sep="\n", flush=True)
        else:
            print(_describe_row(mutation, tallies[mutation]), flush=True)
    report = "\n".join(_describe(tallies, args.seed, time.perf_counter() - start))
    if not failed and args.mutants >= _NIGHTLY:
        old = REPORT.read_text("utf-8") if REPORT.exists() else ""
        for mark in re.findall("<!-- /(.*) -->", old):
            report = keep_part(report, mark, find_part(old, mark))
        REPORT.write_text(report, encoding="utf-8")
    print(report if not failed else f"broken by: {', '.join(failed)}; seed {args.seed}")
    return 1 if failed else 0


def find_part(report: str, mark: str) -> str:
    """What stands in a report between the marks of another run; "" if there is none."""
    found = re.search(f"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", report, re.DOTALL)
    return found[1] if found else ""


def keep_part(report: str, mark: str, part: str) -> str:
    """The report with this part between its marks, at the end if they are not there yet."""
    whole = f"<!-- {mark} -->\n{part}\n<!-- /{mark} -->\n"
    old = f"<!-- {mark} -->\n{find_part(report, mark)}\n<!-- /{mark} -->\n"
    return report.replace(old, whole) if old in report else f"{report.rstrip()}\n\n{whole}"


def _describe(tallies: Mapping[str, Tally], seed: int, seconds: float) -> Iterator[str]:
    distinct = sum(tally.distinct for tally in tallies.values())
    yield from _INTRODUCTION.format(
        distinct=distinct,
        bases=", ".join(make_bases()),
        seed=seed,
        seconds=seconds,
        jax=jax.__version__,
        python=platform.python_version(),
        limit=SECONDS,
        megabytes=MAX_BYTES >> 20,
    ).splitlines()
    yield _HEADER
    yield "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |"
    for name, tally in tallies.items():
        yield _describe_row(name, tally)
    yield _describe_row("all", _add(tallies.values()))
    yield from _KINDS.splitlines()
    kinds = sum((tally.kinds for tally in tallies.values()), Counter())
    for number, title in TITLES.items():
        yield f"| {number} | {title} | {kinds[number]:,} |"
    yield ""


def _describe_row(name: str, tally: Tally) -> str:
    kinds = ", ".join(f"{kind} ({count:,})" for kind, count in tally.kinds.most_common(5))
    cells = (
        name,
        f"{tally.distinct:,}",
        f"{tally.loaded:,}",
        f"{tally.mutants - tally.loaded:,}",
        kinds,
        f"{1e3 * tally.seconds / max(1, tally.mutants):.1f}",
        f"{1e3 * tally.worst_seconds:.0f}",
        f"{tally.worst_bytes / 1e6:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _add(tallies) -> Tally:
    """All of them as one."""
    total = Tally()
    for tally in tallies:
        total.mutants += tally.mutants
        total.distinct += tally.distinct
        total.loaded += tally.loaded
        total.kinds += tally.kinds
        total.seconds += tally.seconds
        total.worst_seconds = max(total.worst_seconds, tally.worst_seconds)
        total.worst_bytes = max(total.worst_bytes, tally.worst_bytes)
    return total


_INTRODUCTION = """\
# Reliability of the loader

Made by `make fuzz`; not edited by hand. {distinct:,} different mutants in {seconds:.0f} s,
seed {seed} (`make fuzz SEED={seed}` makes the same again), jax {jax}, Python {python}.

## What is promised

Whatever the files of a checkpoint are, `load_checkpoint` either gives the exact numbers that are
in them, or raises a `CheckpointError` that lists what is wrong: file, tensor, and the way out. It
never ends in another error, never hangs, never takes memory that the tensors do not account for,
opens no file outside of the folder, and runs nothing that lies in it.

## How that is tested

Small valid checkpoints are broken, or only rewritten, in one of the ways below, by Hypothesis
({bases}).
Each mutant is then loaded, and verified as `jaxwna16 verify` does it, while

- every file that is opened is noted: one outside of the folder fails the run;
- a timer ends what computes for {limit:.0f} s, or waits for five minutes;
- resident memory may grow by {megabytes} MB at most (most of it is XLA's compiler), the address
  space by 2 GB;
- any error that is not a `CheckpointError` fails the run, and so does a fault of none of the kinds.

What loads is compared bit for bit with what is read without the loader: tensors by the
`safetensors` library, schemes by compressed-tensors from the mutated config.json, integers and
tiles by a few lines of NumPy (`tests/fuzz/oracle.py`). Harmless rewritings must load, and give what
they gave before. `verify` must refuse whatever loading refuses, and nothing else (but for the
tensors of a model, and the checksums of a converted copy).

Fuzzing does not reach GPUs, files larger than a few KB, or files that change while they are read;
those have tests of their own (`tests/loaders/test_faults.py` shows each kind of fault).

The GPU kernels are proved in another way: their PTX, compiled for sm_80 to sm_100a, is executed on
a CPU, where it gives the right numbers and breaks no rule but one, on sm_100a with jax 0.12
([executed.md](executed.md) explains it); a wait, fence, barrier, mask, shift or product that is
dropped or changed on purpose is noticed, or a test says why it changes nothing. Not proved are
NVIDIA's assembler, the weak order of memory, and the rounding of tensor cores.

## What became of the mutants

Times are of computing and memory is what was added, both of loading alone. The slowest had XLA
compile something. Some mutants come out alike: "different" counts them once, all other columns each
time. A mutant with several faults counts under each kind.

"""
_HEADER = (
    "| what was done | different | loaded, exact | refused | most frequent kinds of faults "
    "| mean ms | worst ms | memory, MB |"
)
_KINDS = """
## Kinds of faults

12 and 19 are found by `verify` and by a model, 15 and 17 do not come about this way.

| kind | what | times |
| ---: | --- | ---: |"""


if __name__ == "__main__":
    sys.exit(main())
