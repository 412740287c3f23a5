"""What the kernels must reach on an H200, and what a run has measured of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from jaxwna16.bench.engines import CHAINED
from jaxwna16.bench.run import GROUPING, Row, find_median
from jaxwna16.bench.shapes import MOE_MODELS, MoeShape

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
      unit: "%" for a share, "x" for a ratio, "points" for a difference of shares, else its name.
      pick: the row whose peers are shown beside it.
      others: what other projects publish.
      kind: the kind of cases that it is measured on.
    """

    case: str
    wanted: str
    reached: Callable[[float], bool]
    measure: Find
    unit: str
    pick: Callable[[Sequence[Row]], Row | None]
    others: str = ""
    kind: str = "dense"


def find_row(
    rows: Sequence[Row], place: Place, bits: int = 4, symmetric: bool = False
) -> Row | None:
    """The first row of a place, whatever its group size."""
    wanted = (*place, bits, symmetric)
    keys = ("in_features", "out_features", "tokens", "bits", "symmetric")
    return next((row for row in rows if tuple(row.get(key) for key in keys) == wanted), None)


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


def _fall(rows: Sequence[Row]) -> float | None:
    pair = [find_row(rows, (8192, 8192, tokens)) for tokens in (1, 16)]
    shares = [row["figures"]["bandwidth_share"] for row in pair if row and row["figures"]]
    return shares[0] - shares[1] if len(shares) == 2 else None


def _kind_of(row: Row) -> str:
    if "slots" in row:
        return "step"
    return "moe" if "experts_touched" in row else "dense"


def _compare_symmetry(name: str, kind: str) -> Target:
    """The largest ratio of times, asymmetric to symmetric, of all pairs that were timed."""
    same = ("shape", "tokens", "bits", "group_size", "dtype")

    def measure(rows: Sequence[Row]) -> float | None:
        times: dict[bool, dict[tuple, float]] = {True: {}, False: {}}
        for row in rows:
            seconds = find_median(row, "ours")
            if seconds and _kind_of(row) == kind:
                times[row["symmetric"]][tuple(row[fact] for fact in same)] = seconds
        ratios = [
            seconds / times[True][key]
            for key, seconds in times[False].items()
            if key in times[True]
        ]
        return max(ratios, default=None)

    def reached(value: float) -> bool:
        return value <= 1.05

    return Target(name, "<= 1.05", reached, measure, "x", lambda rows: None, kind=kind)


def _worst_of_experts(
    name: str,
    text: str,
    reached: Callable[[float], bool],
    read: Callable[[Row], float | None],
    unit: str,
    tokens: Collection[int],
    shape: MoeShape | None = None,
    others: str = "",
) -> Target:
    """The worst value of 4 bits, asymmetric, of some numbers of tokens; of one shape, or of all."""

    worst = max if reached(-math.inf) else min
    label = shape and shape.label

    def find(rows: Sequence[Row]) -> tuple[float | None, Row | None]:
        found: list[tuple[float, Row]] = []
        for row in rows:
            fits = _kind_of(row) == "moe" and (row["bits"], row["symmetric"]) == (4, False)
            fits = fits and row["tokens"] in tokens
            value = read(row) if fits and label in (None, row["shape"]) else None
            found += [] if value is None else [(value, row)]
        return worst(found, key=lambda one: one[0]) if found else (None, None)

    def measure(rows: Sequence[Row]) -> float | None:
        return find(rows)[0]

    def pick(rows: Sequence[Row]) -> Row | None:
        return find(rows)[1]

    return Target(name, text, reached, measure, unit, pick, others, kind="moe")


def _read_copy_share(row: Row) -> float | None:
    large = row["bytes"] >= 100e6  # below, launches and caches matter too much
    return row["figures"]["bandwidth_share"] if row["figures"] and large else None


def _read_teraflops(row: Row) -> float | None:
    return row["figures"]["teraflops_per_second"] if row["figures"] else None


def _read_grouping(row: Row) -> float | None:
    timing = row["parts"].get(GROUPING, {}).get(CHAINED)
    return timing and timing["median"] * 1e6


def _list_moe_targets() -> list[Target]:
    small = MOE_MODELS["qwen3-30b-a3b"]
    return [
        _worst_of_experts(
            f"MoE decode, {small.label}, W4, T=1..64, worst of >= 100 MB",
            ">= 65 % of copy over touched experts",
            lambda value: value >= 0.65,
            _read_copy_share,
            "%",
            range(1, 65),
            small,
            "vLLM's Triton MoE re-reads each byte twice",
        ),
        *(
            _worst_of_experts(
                f"MoE prefill, {shape.label}, W4, T=4096",
                ">= 350 TFLOP/s",
                lambda value: value >= 350,
                _read_teraflops,
                "TFLOP/s",
                (4096,),
                shape,
                "Marlin MoE 254 TFLOP/s (H100)",
            )
            for shape in MOE_MODELS.values()
        ),
        _compare_symmetry("MoE asymmetric / symmetric time, worst pair", "moe"),
        _worst_of_experts(
            "MoE grouping, worst T",
            "<= 10 us",
            lambda value: value <= 10,
            _read_grouping,
            "us",
            range(1, 4097),
        ),
    ]


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
    _compare_symmetry("asymmetric / symmetric time, worst pair", "dense"),
    *_list_moe_targets(),
)


def judge_targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every target with what was measured, and the microseconds of ours and the peers beside it.

    Only targets for the kinds of cases in the rows; all targets if there are no rows.
    """
    kinds = {_kind_of(row) for row in rows} or {target.kind for target in TARGETS}
    table = []
    for target in [target for target in TARGETS if target.kind in kinds]:
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
    if line["unit"] in ("%", "points"):
        return f"{value * 100:.0f} {line['unit']}"
    return f"{value:.3g} {line['unit']}"
