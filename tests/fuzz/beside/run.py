"""Mutation fuzzing of the files beside the weights, and a table of what became of the mutants.

    python -m tests.fuzz.beside.run                  5,000 mutants; writes a part of reliability.md
    python -m tests.fuzz.beside.run --mutants 500    fewer, and writes nothing
    python -m tests.fuzz.beside.run --seed 7         the same ones again

The exit code is 1 if a mutant broke the promise; it is printed, made as small as possible.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import secrets
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import tokenizers

from tests.fuzz.beside.bases import make_bases
from tests.fuzz.beside.check import Tally, Worker, check_bases, run
from tests.fuzz.beside.mutations import MUTATIONS
from tests.fuzz.run import REPORT, keep_part

MARK = "beside the weights"
_NIGHTLY = 5_000
_SECONDS = 1.0
"""Of a template or tokenizer: fewer than they have, so that more of the mutants meet that limit."""
_MEGABYTES = 2048
_SPARE = 1.25
"""Some mutants come out alike, and are counted once."""


def main() -> int:
    """Run everything and print, or write, this part of the report; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mutants", type=int, default=_NIGHTLY)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    start = time.perf_counter()
    each = round(args.mutants * _SPARE / len(MUTATIONS))
    tallies, failed = _run_all(each, args.seed, args.jobs)
    part = "\n".join(_describe(tallies, args.seed, time.perf_counter() - start))
    if not failed and args.mutants >= _NIGHTLY:
        REPORT.write_text(keep_part(REPORT.read_text("utf-8"), MARK, part), encoding="utf-8")
    print(part if not failed else f"broken by: {', '.join(failed)}; seed {args.seed}")
    return 1 if failed else 0


def _run_all(each: int, seed: int, jobs: int) -> tuple[dict[str, Tally], list[str]]:
    """The tallies of all mutations, several at a time, and the names of those that failed."""
    tallies, failed = {}, []
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        orders = [(mutation, each, seed) for mutation in MUTATIONS]
        for mutation, found in pool.imap_unordered(_run, orders, chunksize=1):
            if isinstance(found, Tally):
                tallies[mutation] = found
                print(_describe_row(mutation, found), flush=True)
            else:
                failed.append(mutation)
                print(found, flush=True)
    return {name: tallies[name] for name in MUTATIONS if name in tallies}, failed


def _run(order: tuple[str, int, int]) -> tuple[str, Tally | str]:
    """One mutation and its tally, or what broke the promise."""
    mutation, each, seed = order
    worker = Worker(_SECONDS, _MEGABYTES)
    try:
        with tempfile.TemporaryDirectory() as root:
            check_bases(Path(root), worker)
        return mutation, run(mutation, each, seed, worker)
    except Exception as error:
        return mutation, "\n".join([traceback.format_exc(), *getattr(error, "__notes__", ())])
    finally:
        worker.stop()


def _describe(tallies: Mapping[str, Tally], seed: int, seconds: float) -> Iterator[str]:
    yield from _INTRODUCTION.format(
        distinct=sum(tally.distinct for tally in tallies.values()),
        bases=", ".join(make_bases()),
        seed=seed,
        seconds=seconds,
        jax=jax.__version__,
        tokenizers=tokenizers.__version__,
        python=platform.python_version(),
    ).splitlines()
    for name, tally in tallies.items():
        yield _describe_row(name, tally)


def _describe_row(name: str, tally: Tally) -> str:
    cells = (
        name,
        f"{tally.distinct:,}",
        f"{tally.generated:,}",
        *(f"{tally.refused[step]:,}" for step in ("verify", "load_model", "tokenizer")),
        f"{tally.refused['chat'] + tally.refused['generate']:,}",
        f"{1e3 * tally.seconds / max(1, tally.mutants):.0f}",
        f"{tally.worst_seconds:.1f}",
        f"{tally.worst_bytes / 1e6:.0f}",
    )
    return f"| {' | '.join(cells)} |"


_INTRODUCTION = """\
## The files beside the weights

Made by `make fuzz`; not edited by hand. {distinct:,} different mutants in {seconds:.0f} s,
seed {seed}, jax {jax}, tokenizers {tokenizers}, Python {python}.

### What is promised of tokenizers, templates, settings and output

Whatever tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
generation_config.json and config.json hold, `inspect`, `verify`, `load_model`, `Tokenizer` and
`generate` give a result, or raise an error of ours that says why, within seconds and 2 GB.

- **Chat templates** are rendered in a process of their own, in Jinja's sandbox: 3 s of computing,
  512 MB, 8,000,000 characters. One process serves all templates. It costs 0.3 ms a chat, and its
  start 0.1 s once.
- **Tokenizers** of which every stage is known to take and make little run in the process of the
  caller: those of published models. All others run in a process with limits: 2 GB, and 5 s of
  computing for a text of up to 100,000 characters, 1 s for its tokens. A panic of the library is
  an `InputError`.
- `dropout` of merges is switched off, with a warning: with it, a text has other ids each time.
- **Streams**: the text that is streamed is the text that is returned, for every decoder. Stop
  strings are looked for in the decoded text. A decoder that takes text back (such as one that
  replaces a pattern in all of it) streams everything at the end.
- **Output**: no name in a file can look like a line of ours; generated text is shown on a terminal
  and not obeyed; `--json` is valid JSON, always.

Limits of time and memory are the system's. On macOS memory has none, on Windows only the clock ends
a call.

### How that is tested

Small valid checkpoints that generate ({bases}) are changed in one of the ways below.
A process then inspects, verifies and loads each mutant, reads its tokenizer, puts a prompt into its
chat template and generates four tokens (after 16 at most, as XLA would compile for more). It has
2 GB of addresses and 10 s of computing for a mutant; one that ends it, or any error that is not
ours, fails the run. So do a message of more than 50,000 characters or with a control character in
it, a report that is not JSON, text that was streamed and not returned, and anything that a library
prints. Templates and tokenizers have 1 s here, so that more mutants meet that limit.

Times are of computing, in all processes together; the slowest meet the limit of theirs, or have XLA
compile something. Memory is what was added in the process of the caller.

A mutant that is refused by several counts under each.

| mutation | different | generated | verify | loading | tokenizer | chat | mean ms | worst s | MB |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


if __name__ == "__main__":
    sys.exit(main())
