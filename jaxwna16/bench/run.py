"""Time cases one after another, and put what was found beside this device's limits."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxwna16.bench.engines import (
    CHAINED,
    EXPAND,
    FLOAT,
    GRAPH_FREE,
    SINGLE,
    AnyCase,
    Engine,
    Grouping,
    Program,
    compile_program,
    make_weights,
)
from jaxwna16.bench.limits import Limits
from jaxwna16.bench.moe_cases import MoeCase
from jaxwna16.bench.timing import Clock, Effort
from pallas_kernels.errors import Wna16Error

OURS = "ours"
GROUPING = "grouping"
_PARTS = (GROUPING,)
OUT_OF_TIME = "not timed: the time for the whole run was over (--seconds)"
_SOME_TOKENS = (1, 16, 128, 1024)
_MANY_TOKENS = 5
_GPU_FIGURES = {
    OURS: (CHAINED, GRAPH_FREE, SINGLE),
    FLOAT.name: (CHAINED, GRAPH_FREE),
    EXPAND.name: (CHAINED,),
    GROUPING: (CHAINED,),
}
_CPU_FIGURES = {OURS: (CHAINED, SINGLE), FLOAT.name: (CHAINED,), GROUPING: (CHAINED,)}

Report = Callable[[str], None]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Deadline:
    """The time after which nothing more is started."""

    seconds: float
    clock: Clock = time.monotonic
    begin: float = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "begin", self.clock())

    @property
    def left(self) -> float:
        """Seconds that are left, 0 when it is over."""
        return max(0.0, self.begin + self.seconds - self.clock())


@dataclasses.dataclass
class Bench:
    """What is measured, and how.

    Attributes:
      cases: those of one weight follow each other.
      backend: None for the GPU's kernels; "xla" on a CPU, where that is ours.
      effort: how long each is timed.
      deadline: after it no case is begun.
      report: is told what happens.
    """

    cases: Sequence[AnyCase]
    backend: str | None
    effort: Effort
    deadline: Deadline
    report: Report = lambda text: None
    _floats: dict[Hashable, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def _figures(self) -> dict[str, tuple[str, ...]]:
        return _GPU_FIGURES if self.backend is None else _CPU_FIGURES

    def run(self) -> Iterator[list[Row]]:
        """Time every case, and yield the rows of one weight after another.

        A failure is written in its row, and the others go on.
        """
        for weight in dict.fromkeys(case.weight for case in self.cases):
            yield self._run_weight([case for case in self.cases if case.weight == weight])

    def _run_weight(self, cases: list[AnyCase]) -> list[Row]:
        rows = [
            {
                **case.describe(),
                "schedule": self._name_schedule(case),
                "engines": {},
                "parts": {},
                "peers": {},
            }
            for case in cases
        ]
        by_case = dict(zip(cases, rows, strict=True))
        if not self.deadline.left:
            for row in rows:
                row["engines"][OURS] = {"error": OUT_OF_TIME}
            return rows
        plan = self._plan(cases)
        self.report(f"{cases[0].label} and {len(cases) - 1} more: compiling")
        programs = self._compile(plan)
        # the engines on packed weights share them, and only one kind of weight is held at a time
        for engines in ([e for e in plan if e.packed], [e for e in plan if not e.packed]):
            self._time_engines(engines, plan, programs, by_case)
        return rows

    def _plan(self, cases: list[AnyCase]) -> dict[Engine, list[AnyCase]]:
        """Which cases each engine is timed on."""
        few = len(cases) <= _MANY_TOKENS
        some = [c for c in cases if few or c.tokens in _SOME_TOKENS]
        plan = {Engine(OURS, packed=True, backend=self.backend): cases}
        grouped = [c for c in cases if self._is_grouped(c)]
        if grouped:
            plan[Grouping(GROUPING, packed=True, backend=self.backend)] = grouped
        if self.backend is None:
            plan[EXPAND] = some
        floats = some if cases[0].is_looped else cases
        plan[FLOAT] = [c for c in floats if c.float_key not in self._floats]
        return plan

    def _compile(self, plan: dict[Engine, list[AnyCase]]) -> dict[tuple, Program | Exception]:
        """Compile all programs of one weight at once, on all processors."""
        jobs = [
            (engine, case, figure)
            for engine, cases in plan.items()
            for case in cases
            for figure in self._figures[engine.name]
        ]

        def compile_one(job: tuple[Engine, AnyCase, str]) -> Program | Exception:
            engine, case, figure = job
            try:
                return compile_program(engine, case, figure, self._choose_effort(engine, case))
            except Exception as error:
                return error

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return dict(zip(jobs, pool.map(compile_one, jobs), strict=True))

    def _time_engines(self, engines, plan, programs, by_case) -> None:
        weights = None
        for engine in engines:
            for case in plan[engine]:
                found: dict[str, Any] = {}
                by_case[case]["parts" if engine.name in _PARTS else "engines"][engine.name] = found
                if not self.deadline.left:
                    found["error"] = OUT_OF_TIME
                    continue
                self.report(f"{case.label}: {engine.name}")
                try:
                    weights = weights or make_weights(engine, case, self.effort)
                    for figure in self._figures[engine.name]:
                        program = programs.pop((engine, case, figure))
                        if isinstance(program, Exception):
                            raise program
                        effort = self._choose_effort(engine, case)
                        found[figure] = dataclasses.asdict(program.time(weights, effort))
                        found["layers"] = max(program.products, found.get("layers", 0))
                except Exception as error:
                    found["error"] = describe_failure(error)
        if FLOAT in engines:
            self._share_floats(plan[FLOAT], by_case)

    def _share_floats(self, timed: list[AnyCase], by_case: dict[AnyCase, Row]) -> None:
        """A float product is the same for every packed form of its weight: time it once."""
        for case in timed:
            self._floats[case.float_key] = by_case[case]["engines"][FLOAT.name]
        for case, row in by_case.items():
            if case.float_key in self._floats:
                row["engines"][FLOAT.name] = self._floats[case.float_key]

    def _choose_effort(self, engine: Engine, case: AnyCase) -> Effort:
        """Less effort for loops in XLA that only serve as a comparison: they take milliseconds."""
        if not case.is_looped or engine.name not in (FLOAT.name, EXPAND.name):
            return self.effort
        layers, batches = min(4, self.effort.layers), min(3, self.effort.batches)
        return dataclasses.replace(self.effort, layers=layers, batches=batches)

    def _is_grouped(self, case: AnyCase) -> bool:
        try:
            return isinstance(case, MoeCase) and case.is_grouped(self.backend)
        except Wna16Error:  # reported in place of the schedule
            return False

    def _name_schedule(self, case: AnyCase) -> str:
        try:
            return case.name_schedule(self.backend)
        except Wna16Error as error:
            return f"none: {error}"


def describe_failure(error: BaseException) -> str:
    """Type and first line of an error; compilers write pages."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def find_timing(row: Row, engine: str) -> dict[str, Any] | None:
    """The faster of the chains of an engine or peer, None if none was timed."""
    found = row["engines"].get(engine) or row["peers"].get(engine) or {}
    chains = [found[figure] for figure in (CHAINED, GRAPH_FREE) if figure in found]
    return min(chains, key=lambda timing: timing["median"], default=None)


def find_median(row: Row, engine: str) -> float | None:
    """Seconds of one product in a chain, None if that was not timed."""
    timing = find_timing(row, engine)
    return timing["median"] if timing else None


def add_shares(rows: Iterable[Row], limits: Limits) -> None:
    """Add to each row what its chained time means: rates, shares of the limits, ratios.

    `limit_seconds` is the larger of the times that moving the bytes and computing would take at
    this device's limits; no kernel can be faster, except for data that it finds in a cache. The
    `share` of a part is its time, alone in a chain of its own, over that of the whole.
    """
    for row in rows:
        memory = row["bytes"] / limits.bytes_per_second
        compute = row["flops"] / limits.flops_per_second
        row["limit_seconds"] = max(memory, compute)
        seconds = find_median(row, OURS)
        row["figures"] = seconds and {
            "gigabytes_per_second": row["bytes"] / seconds / 1e9,
            "teraflops_per_second": row["flops"] / seconds / 1e12,
            "bandwidth_share": memory / seconds,
            "compute_share": compute / seconds,
            "limit_share": row["limit_seconds"] / seconds,
        }
        others = [name for name in (*row["engines"], *row["peers"]) if name != OURS]
        times = {name: find_median(row, name) for name in others}
        row["times_as_fast_as"] = {
            name: other / seconds for name, other in times.items() if other and seconds
        }
        for part in row["parts"].values():
            if seconds and CHAINED in part:
                part["share"] = part[CHAINED]["median"] / seconds


def count_failures(rows: Iterable[Row]) -> int:
    """How many of our cases failed; a case for which no time was left is not a failure."""
    errors = [row["engines"].get(OURS, {}).get("error") for row in rows]
    return sum(error is not None and error != OUT_OF_TIME for error in errors)
