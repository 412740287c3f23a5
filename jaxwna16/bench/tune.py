"""Find the fastest tiles for this GPU, and write them into its table.

Every candidate is compiled by itself. Its products are compared with those of the XLA path, and it
is timed only if they agree. All candidates are timed briefly, then the fastest few at length. The
rule's own choice stays unless another is faster by more than the noise.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxwna16.bench.cases import Inputs, Weight
from jaxwna16.bench.engines import (
    CHAINED,
    AnyCase,
    Engine,
    Program,
    compile_program,
    make_weights,
)
from jaxwna16.bench.run import Deadline, Report, describe_failure
from jaxwna16.bench.timing import ON_GPU, Effort
from pallas_kernels.errors import TableError
from pallas_kernels.tiles.dense_rules import fix_schedule
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.entries import Entry, MoeEntry, TileTable, round_up_bucket
from pallas_kernels.tiles.expert_tiles import MoeTiles
from pallas_kernels.tiles.tables import read_table, write_table
from pallas_kernels.tiles.tiles import Schedule

AnySchedule = Schedule | MoeTiles

TOKENS = (1, 16, 64, 256, 128, 32, 8, 512, 1024, 4, 2, 2048, 4096)
"""What is tuned by default: every bucket of a table, first what other projects publish."""

MOE_TOKENS = (1, 16, 64, 4096, 8, 32, 4, 2, 256, 1024, 128, 512, 2048)
"""Likewise for experts."""

NOISE = 0.01
"""A candidate must be faster than the rule's choice by this share to replace it."""

AGREEMENT = 2**-6
"""The largest difference from the XLA path that passes, relative to the largest result.

Rounding x, W and the result to 16 bits makes differences of about 2^-8 of a result's size; a tile
that is lost, doubled or misplaced makes some as large as the results.
"""

SHORT = dataclasses.replace(ON_GPU, layers=32, batch_seconds=0.003, batches=5)
LONG = dataclasses.replace(ON_GPU, layers=32, batch_seconds=0.006, batches=15)
_FINALISTS = 4
_KEPT_WEIGHTS = 16


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate: the seconds of one product, or why there are none."""

    schedule: AnySchedule
    seconds: float | None
    error: str | None = None


RunTrials = Callable[[AnyCase, Sequence[AnySchedule]], list[Trial]]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The outcome for one case: all trials, the rule's choice first, and the one to use."""

    case: AnyCase
    trials: tuple[Trial, ...]
    best: Trial | None

    def describe(self) -> dict[str, Any]:
        """For a report; candidates that failed are listed with the reason."""
        rule = self.trials[0]
        return {
            **self.case.describe(),
            "candidates": len(self.trials),
            "rule": self._name(rule),
            "rule_seconds": rule.seconds,
            "best": self.best and self._name(self.best),
            "best_seconds": self.best and self.best.seconds,
            "failures": [
                {"schedule": self._name(t), "error": t.error} for t in self.trials if t.error
            ],
        }

    def _name(self, trial: Trial) -> str:
        return self.case.describe_schedule(trial.schedule)


def plan_tuning(cases: Iterable[AnyCase]) -> list[AnyCase]:
    """One case for each entry of a table, first the weights and numbers of tokens that matter most.

    Each weight is two numbers of tokens behind the one before. So whenever the time is over, the
    first weights have most of theirs, and none is complete while another has nothing. A table has
    buckets of tokens, and does not tell symmetric weights from others.
    """
    found: dict[Any, AnyCase] = {}
    for case in cases:
        case = dataclasses.replace(case, tokens=round_up_bucket(case.tokens))
        found.setdefault((case.kind, case.make_entry(None).key), case)
    weights = list(dict.fromkeys(case.weight for case in found.values()))
    order = MOE_TOKENS if any(case.kind == "moe" for case in found.values()) else TOKENS
    tokens = sorted({case.tokens for case in found.values()}, key=order.index)

    def place(case: AnyCase) -> int:
        return tokens.index(case.tokens) + 2 * weights.index(case.weight)

    return sorted(found.values(), key=place)


def tune_cases(
    cases: Iterable[AnyCase],
    device: Device,
    deadline: Deadline,
    run_trials: RunTrials,
    report: Report = lambda text: None,
) -> Iterator[Tuned]:
    """Tune one case after another until all are done or the time is over."""
    for case in cases:
        if not deadline.left:
            return
        candidates = case.list_candidates(device)
        report(f"{case.label}: {len(candidates)} candidates")
        trials = run_trials(case, candidates)
        timed: list[Any] = [(trial.schedule, trial.seconds) for trial in trials if trial.seconds]
        more = case.list_more(candidates[0], timed)
        if more and deadline.left:
            trials = [*trials, *run_trials(case, more)]
        yield Tuned(case, tuple(trials), pick_best(trials))


def pick_best(trials: Sequence[Trial]) -> Trial | None:
    """The fastest; the first if none is faster by more than the noise; None if all failed."""
    timed = [(trial.seconds, place) for place, trial in enumerate(trials) if trial.seconds]
    if not timed:
        return None
    seconds, place = min(timed)
    first = trials[0].seconds
    if first is not None and seconds > first * (1 - NOISE):
        place = 0
    return trials[place]


class Workbench:
    """Runs trials on the GPU; weights of the cases before are kept."""

    def __init__(self, deadline: Deadline, backend: str | None = None):
        self._deadline = deadline
        self._engine = Engine("ours", packed=True, backend=backend)
        self._weights: dict[Any, list[Weight]] = {}

    def __call__(self, case: AnyCase, candidates: Sequence[AnySchedule]) -> list[Trial]:
        """Time the candidates; those for which no time is left are failed trials."""
        weights = self._make_weights(case)
        inputs = case.draw_inputs(0)
        wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == case.dtype else a, inputs)
        expected = case.compute(wide, weights[0], packed=True, backend="xla")
        trials: dict[AnySchedule, Trial] = {}
        programs: dict[AnySchedule, Program] = {}
        for schedule, program in self._compile(case, candidates):
            if isinstance(program, str):
                trials[schedule] = Trial(schedule, None, program)
                continue
            trials[schedule] = self._try(schedule, program, weights, SHORT, inputs, expected)
            programs[schedule] = program
        timed = sorted((t for t in trials.values() if t.seconds), key=lambda t: t.seconds or 0)
        first = [trial for trial in timed if trial.schedule == candidates[0]]
        for trial in dict.fromkeys([*timed[:_FINALISTS], *first]):
            program = programs[trial.schedule]
            trials[trial.schedule] = self._try(trial.schedule, program, weights, LONG)
        # a candidate that was only timed briefly is slower than the finalists
        return [trials[schedule] for schedule in candidates]

    def _make_weights(self, case: AnyCase) -> list[Weight]:
        key = case.weight, case.dtype
        if key not in self._weights:
            while len(self._weights) >= _KEPT_WEIGHTS:
                del self._weights[next(iter(self._weights))]
            self._weights[key] = make_weights(self._engine, case, LONG)
        return self._weights[key]

    def _compile(
        self, case: AnyCase, candidates: Sequence[AnySchedule]
    ) -> Iterator[tuple[AnySchedule, Program | str]]:
        """Compile on all processors, some candidates at a time, so that time can run out."""

        def compile_one(schedule: AnySchedule) -> Program | str:
            try:
                with fix_schedule(schedule):
                    return compile_program(self._engine, case, CHAINED, LONG, feed=False)
            except Exception as error:
                return describe_failure(error)

        workers = os.cpu_count() or 1
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(candidates), 2 * workers):
                some = candidates[start : start + 2 * workers]
                if start and not self._deadline.left:
                    yield from ((schedule, "not tried: the time was over") for schedule in some)
                    continue
                yield from zip(some, list(pool.map(compile_one, some)), strict=True)

    def _try(
        self,
        schedule: AnySchedule,
        program: Program,
        weights: list[Weight],
        effort: Effort,
        inputs: Inputs = None,
        expected: jax.Array | None = None,
    ) -> Trial:
        """Time a program; if inputs are given, check its products first."""
        try:
            if expected is not None:
                count = program.products
                results = program.run([inputs] * count, [weights[0]] * count)
                fault = find_disagreement(results, expected)
                if fault:
                    return Trial(schedule, None, fault)
            return Trial(schedule, program.time(weights, effort).median)
        except Exception as error:
            return Trial(schedule, None, describe_failure(error))


def find_disagreement(results: Sequence[jax.Array], expected: jax.Array) -> str | None:
    """Why results that should all equal `expected` are wrong, None if they are right."""
    size = float(jnp.max(jnp.abs(expected)))
    for place, y in enumerate(results):
        difference = jnp.abs(y.astype(jnp.float32) - expected)
        # NaN is not within; the largest difference alone could hide one, XLA's maximum drops it
        within = difference <= AGREEMENT * size
        if not bool(jnp.all(within)):
            return (
                f"wrong: product {place} differs in {int(jnp.sum(~within))} places from the XLA "
                f"path, by up to {float(jnp.nanmax(difference)):.3g}; results reach {size:.3g}"
            )
    return None


def write_winners(tuned: Iterable[Tuned], device: Device, path: Path, made: dict[str, str]) -> int:
    """Put the best of each case into the table at `path`; its other entries stay.

    Args:
      tuned: the outcomes; a case without a best leaves the table's entry as it is.
      device: the GPU it was tuned on.
      path: the table; it may not exist yet.
      made: with what and when, for people.

    Returns:
      How many entries the table has.

    Raises:
      TableError: if there is a table that cannot be used, or is of another device.
    """
    table = read_tuned(path, device)
    found = [outcome.case.make_entry(outcome.best.schedule) for outcome in tuned if outcome.best]
    entries = {e.key: e for e in [*table.entries, *found] if isinstance(e, Entry)}
    experts = {e.key: e for e in [*table.experts, *found] if isinstance(e, MoeEntry)}
    new = TileTable(
        device.kind, tuple(entries.values()), made, tuple(experts.values()), table.ahead
    )
    write_table(path, new)
    return len(entries) + len(experts)


def read_tuned(path: Path, device: Device) -> TileTable:
    """The table at `path`, an empty one if there is no such file.

    Raises:
      TableError: if the table cannot be used, or is of another device.
    """
    if not path.exists():
        return TileTable(device.kind, (), {})
    table = read_table(path)
    if table.device_kind != device.kind:
        raise TableError(
            f"{path} is a table for {table.device_kind}, this is {device.kind}: name another file "
            "with --table"
        )
    return table
