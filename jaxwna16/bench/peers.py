"""Other projects' kernels for the same cases, on the same machine, in the same run.

Each runs in a process of its own (`jaxwna16.bench.peer_worker`). So a peer that crashes, hangs or
breaks its CUDA context loses only its own figures. A peer that is not installed is reported with
the reason.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxwna16.bench.engines import CHAINED, AnyCase
from jaxwna16.bench.peer_worker import MARK, PEERS, find_missing
from jaxwna16.bench.run import Deadline, Row
from jaxwna16.bench.timing import Effort

_SHAPES = 3
_TOKENS = {"dense": (1, 16, 64, 128, 256, 1024), "moe": (1, 16, 64, 256, 1024, 4096)}
_ENOUGH = 24
_WORKER = (sys.executable, "-m", "jaxwna16.bench.peer_worker")
_LAST_LINES = 5


def time_peers(
    cases: Sequence[AnyCase],
    rows: Sequence[Row],
    effort: Effort,
    deadline: Deadline,
    report: Callable[[str], None] = lambda text: None,
    *,
    worker: Sequence[str] = _WORKER,
) -> Iterator[dict[str, Any]]:
    """Time every peer on the cases, write the times into the rows, and report on each peer.

    Args:
      cases: what is timed, all of one kind. If there are many, a few shapes and numbers of tokens
        are chosen.
      rows: those of the cases, in the same order.
      effort: as for our own figures.
      deadline: the remaining time is shared by the installed peers that are not yet timed.
      report: is told what happens.
      worker: the command of the process that times one peer.

    Yields:
      For one peer after another {"name", "version", "absent", "error"}: `absent` says why it is
      not there.
    """
    chosen = _choose(cases)
    peers = PEERS[cases[0].kind] if cases else {}
    missing = {name: find_missing(peer) for name, peer in peers.items()}
    left = list(missing.values()).count(None)
    for name, module in missing.items():
        if module is not None:
            absent = f"{module} is not installed"
            yield {"name": name, "version": None, "absent": absent, "error": None}
            continue
        report(f"peer {name}: {len(chosen)} cases")
        seconds = deadline.left / left
        left -= 1
        outcome, found = _run_worker(worker, name, [cases[i] for i in chosen], effort, seconds)
        for place, result in found.items():
            rows[chosen[place]]["peers"][name] = result
        yield {"name": name, **outcome}


def _choose(cases: Sequence[AnyCase]) -> list[int]:
    """All cases if they are few, else those of the first shapes at a few numbers of tokens."""
    if len(cases) <= _ENOUGH:
        return list(range(len(cases)))
    first = {}  # the first weight of each shape
    for case in cases:
        first.setdefault(case.shape, case.weight)
    weights = list(first.values())[:_SHAPES]
    return [
        i
        for i, case in enumerate(cases)
        if case.weight in weights and case.tokens in _TOKENS[case.kind]
    ]


def _run_worker(
    worker: Sequence[str], name: str, cases: Sequence[AnyCase], effort: Effort, seconds: float
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Let a process time one peer; what it has printed counts even if it fails later."""
    order = {
        "kind": cases[0].kind,
        "peer": name,
        "effort": dataclasses.asdict(effort),
        "cases": [dataclasses.asdict(case) for case in cases],
    }
    outcome: dict[str, Any] = {"version": None, "absent": None, "error": None}
    with subprocess.Popen(
        worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        text = json.dumps(order).encode()
        try:
            out, err = process.communicate(text, timeout=max(1.0, seconds))
            if process.returncode:
                last = err.decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
                outcome["error"] = f"exit code {process.returncode}: {' | '.join(last)[-600:]}"
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            outcome["error"] = f"stopped after {seconds:.0f} s, which was its share of the time"
    found: dict[int, dict[str, Any]] = {}
    for line in out.decode(errors="replace").splitlines():
        if line.startswith(MARK):
            said = json.loads(line[len(MARK) :])
            if "case" in said:
                found[said.pop("case")] = said
            else:
                outcome |= said
    return outcome, found


def count_timed(rows: Sequence[Row], name: str) -> int:
    """For how many cases a peer has a time."""
    return sum(CHAINED in row["peers"].get(name, {}) for row in rows)
