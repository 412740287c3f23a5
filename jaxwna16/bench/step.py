"""Times the cases of a decode step: our kernels, XLA's own form of the same, and peers.

Each runs as in the product: rounds of a loop on the device, whose state is updated in place, in one
program. A round is a chain of operations, each of which waits for the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxwna16.bench.engines import CHAINED
from jaxwna16.bench.rounds import time_rounds
from jaxwna16.bench.run import OURS, OUT_OF_TIME, Deadline, Row, describe_failure
from jaxwna16.bench.step_cases import StepCase
from jaxwna16.bench.step_peers import PEERS, find_version
from jaxwna16.bench.timing import Effort, Timing
from pallas_kernels.tiles.ahead import fix_ahead

XLA = "xla"
AHEAD = {"4 MiB ahead": 4 << 20, "16 MiB ahead": 16 << 20}
"""Ours with so much of the next weights read ahead (`pallas_kernels.tiles.ahead`). Where that is
faster, `"ahead": BYTES` in the table of tuned tiles turns it on."""


def time_step_cases(
    cases: Sequence[StepCase],
    backend: str | None,
    effort: Effort,
    deadline: Deadline,
    report: Callable[[str], None] = lambda text: None,
) -> Iterator[list[Row]]:
    """Time one case after another, and yield its row.

    Args:
      cases: what is timed.
      backend: of ours; None for the GPU's kernels. XLA's form is timed beside them.
      effort, deadline, report: as in `Bench`.
    """
    for case in cases:
        engines = {OURS: backend} | ({} if backend == XLA else {XLA: XLA})
        # interpreted, or without weights that come next, it could show nothing
        ahead = AHEAD if backend is None and case.operation in ("layer", "step") else {}
        engines |= dict.fromkeys(ahead)
        row: Row = {
            **case.describe(),
            "schedule": backend or "triton",
            "engines": {},
            "parts": {},
            "peers": {},
        }
        for name, its in engines.items():
            report(f"{case.label}: {name}")
            with fix_ahead(ahead.get(name)):
                row["engines"][name] = _try(deadline, time_case, case, its, effort)
        yield [row]


def time_case(case: StepCase, backend: str | None, effort: Effort) -> Timing:
    """Time a case with a backend."""
    chain = case.count_chain(effort)
    fixed, state, advance = case.build(chain, backend)
    return time_rounds(fixed, state, advance, chain, effort)


def _try(deadline: Deadline, time: Callable[..., Timing], *arguments: Any) -> dict[str, Any]:
    if not deadline.left:
        return {"error": OUT_OF_TIME}
    try:
        return {CHAINED: vars(time(*arguments))}
    except Exception as error:
        return {"error": describe_failure(error)}


def time_step_peers(
    cases: Sequence[StepCase],
    rows: Sequence[Row],
    effort: Effort,
    deadline: Deadline,
    report: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Time other attentions on the same cases, as `time_peers` does: one peer after another.

    None of them rotates keys or writes the cache, which ours does.
    """
    chosen = [i for i, case in enumerate(cases) if case.operation == "attention"]
    for name, time_peer in PEERS.items():
        version, absent = find_version(name)
        outcome: dict[str, Any] = {"name": name, "version": version, "absent": absent}
        for i in chosen if absent is None else ():
            report(f"{cases[i].label}: {name}")
            rows[i]["peers"][name] = _try(deadline, time_peer, cases[i], effort)
        yield outcome | {"error": None}
