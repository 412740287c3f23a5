"""What the kernels must reach on an H200, and what a run has measured of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxwna16.bench.run import Row, find_median

Find = Callable[[Sequence[Row]], float | None]
Place = tuple[int, int, int]
"""K, N and M."""

NONE = "—"


@dataclasses.dataclass(frozen=True)
class Target:
    """One line of the table of targets.

    Attributes:
      case: what is measured; shapes are K x N.
      wanted: the target in words.
      reached: says whether a measured value meets it.
      measure: finds the value in the rows of a run.
      unit: "%" for a share, "x" for a ratio, "points" for a difference of shares.
      pick: the row whose peers are shown beside it.
      others: what other projects publish.
    """

    case: str
    wanted: str
    reached: Callable[[float], bool]
    measure: Find
    unit: str
    pick: Callable[[Sequence[Row]], Row | None]
    others: str = ""


def find_row(
    rows: Sequence[Row], place: Place, bits: int = 4, symmetric: bool = False
) -> Row | None:
    """The row of a place; groups of any size, the first that there is."""
    wanted = (*place, bits, symmetric)
    keys = ("in_features", "out_features", "tokens", "bits", "symmetric")
    return next((row for row in rows if tuple(row[key] for key in keys) == wanted), None)


def _share(kind: str, least: float, text: str, others: str, place: Place, bits: int = 4) -> Target:
    def pick(rows: Sequence[Row]) -> Row | None:
        return find_row(rows, place, bits)

    def measure(rows: Sequence[Row]) -> float | None:
        row = pick(rows)
        return row["figures"][kind] if row and row["figures"] else None

    return Target(
        _name(place, bits), text, lambda value: value >= least, measure, "%", pick, others
    )


def _ratio(least: float, text: str, others: str, place: Place) -> Target:
    def pick(rows: Sequence[Row]) -> Row | None:
        return find_row(rows, place)

    def measure(rows: Sequence[Row]) -> float | None:
        row = pick(rows)
        return row["times_as_fast_as"].get("bf16") if row else None

    return Target(_name(place), text, lambda value: value >= least, measure, "x", pick, others)


def _name(place: Place, bits: int = 4) -> str:
    k, n, tokens = place
    return f"W{bits}, M={tokens}, {k}x{n}"


def _unmeasured(case: str, text: str, others: str) -> Target:
    """A target that dense products say nothing about."""
    return Target(case, text, bool, lambda rows: None, "x", lambda rows: None, others)


def _fall(rows: Sequence[Row]) -> float | None:
    pair = [find_row(rows, (8192, 8192, tokens)) for tokens in (1, 16)]
    shares = [row["figures"]["bandwidth_share"] for row in pair if row and row["figures"]]
    return shares[0] - shares[1] if len(shares) == 2 else None


def _compare_symmetry(rows: Sequence[Row]) -> float | None:
    """The largest ratio of times, asymmetric to symmetric, of all pairs that were timed."""
    ratios = []
    for row in rows:
        if row["symmetric"]:
            continue
        place = row["in_features"], row["out_features"], row["tokens"]
        twin = find_row(rows, place, row["bits"], symmetric=True)
        ours = find_median(row, "ours")
        theirs = find_median(twin, "ours") if twin else None
        if ours and theirs:
            ratios.append(ours / theirs)
    return max(ratios, default=None)


_COPY, _RATE = "bandwidth_share", "compute_share"
_MARLIN_64 = "Marlin 1.5x bf16 at 64, 1.0x at 128"
TARGETS = (
    _share(_COPY, 0.62, ">= 62 % of copy", "Marlin, Humming 37 % (H100)", (8192, 8192, 1)),
    _share(_COPY, 0.80, ">= 80 % of copy", "", (8192, 28672, 1)),
    _share(_COPY, 0.40, ">= 40 % of copy", "Marlin 1.65x of fp16", (4096, 4096, 1)),
    _share(_COPY, 0.72, ">= 72 % of copy", "Marlin 52 %", (8192, 8192, 1), bits=8),
    Target(
        "W4, M=16, 8192x8192",
        "<= 10 points below M=1",
        lambda value: value <= 0.10,
        _fall,
        "points",
        lambda rows: find_row(rows, (8192, 8192, 16)),
        "Marlin 2.2x of fp16",
    ),
    _share(_RATE, 0.50, ">= 50 % of matmul rate", _MARLIN_64, (8192, 8192, 64)),
    _share(_RATE, 0.50, ">= 50 % of matmul rate", _MARLIN_64, (8192, 8192, 128)),
    _ratio(1.0, "never slower than bf16", _MARLIN_64, (8192, 8192, 64)),
    _ratio(1.0, "never slower than bf16", _MARLIN_64, (8192, 8192, 128)),
    _share(_RATE, 0.58, ">= 58 % of matmul rate", "Marlin 0.6x of fp16", (8192, 8192, 256)),
    _ratio(0.78, ">= 0.78x of bf16", "Marlin 0.5-0.65x", (8192, 8192, 1024)),
    _ratio(0.90, ">= 0.90x of bf16", "Marlin 0.5-0.65x", (8192, 8192, 4096)),
    Target(
        "asymmetric / symmetric time, worst pair",
        "<= 1.05",
        lambda value: value <= 1.05,
        _compare_symmetry,
        "x",
        lambda rows: None,
    ),
    _unmeasured(
        "MoE decode, E=128, k=8, 2048x768, T=1..64",
        ">= 65 % of copy over touched experts",
        "vLLM's Triton MoE re-reads each byte twice",
    ),
    _unmeasured("MoE prefill, T=4096", ">= 350 TFLOP/s", "Marlin MoE 254 TFLOP/s (H100)"),
)


def judge_targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every target with what was measured, and the microseconds of ours and the peers beside it."""
    table = []
    for target in TARGETS:
        value, row = target.measure(rows), target.pick(rows)
        names = ["ours", "bf16", *row["peers"]] if row else []
        times = {name: find_median(row, name) for name in names if row}
        table.append(
            {
                "case": target.case,
                "target": target.wanted,
                "measured": value,
                "unit": target.unit,
                "reached": None if value is None else target.reached(value),
                "microseconds": {name: t * 1e6 for name, t in times.items() if t},
                "published": target.others,
            }
        )
    return table


def word_measured(line: dict[str, Any]) -> str:
    """The measured value of one line, "—" if there is none."""
    value = line["measured"]
    if value is None:
        return NONE
    if line["unit"] == "x":
        return f"{value:.2f}x"
    return f"{value * 100:.0f} {line['unit']}"
