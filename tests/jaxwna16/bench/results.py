"""Cases and rows with invented times, for the tests of what is made of them."""

from __future__ import annotations

from typing import Any

from jaxwna16.bench.cases import Case, plan_cases
from jaxwna16.bench.limits import Limits
from jaxwna16.bench.moe_cases import MoeCase, plan_moe_cases
from jaxwna16.bench.run import add_shares
from jaxwna16.bench.shapes import parse_moe_shapes, parse_shapes

LIMITS = Limits(1e12, 1e14, "bfloat16", "copy")


def make_cases(shapes: str, tokens: list[int], **facts: Any) -> list[Case]:
    """Cases of 4 bits, groups of 32, with zero points unless told otherwise."""
    usual = {"bits": [4], "group_size": 32, "symmetric": [False], "dtype": "bfloat16"}
    return plan_cases(parse_shapes(shapes), tokens, **(usual | facts))


def make_moe_cases(shapes: str, tokens: list[int], **facts: Any) -> list[MoeCase]:
    """Likewise of experts."""
    usual = {"bits": [4], "group_size": 32, "symmetric": [False], "dtype": "bfloat16"}
    return plan_moe_cases(parse_moe_shapes(shapes), tokens, **(usual | facts))


def make_timing(seconds: float) -> dict[str, Any]:
    """A timing as it stands in a report."""
    return {
        "median": seconds,
        "least": 0.9 * seconds,
        "most": 1.1 * seconds,
        "batches": 9,
        "calls": 4,
    }


def make_row(
    case: Case | MoeCase, peers: dict[str, float] | None = None, **engines: float
) -> dict[str, Any]:
    """The row of a case with the chained seconds of each engine and peer."""
    row = {**case.describe(), "schedule": "decode", "engines": {}, "parts": {}, "peers": {}}
    for name, seconds in engines.items():
        row["engines"][name] = {"chained": make_timing(seconds), "layers": 64}
    for name, seconds in (peers or {}).items():
        row["peers"][name] = {"chained": make_timing(seconds)}
    return row


def make_report(rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A whole report around rows."""
    add_shares(rows, LIMITS)
    machine = {
        "date": "2026-11-21T00:00:00+00:00",
        "commit": "0123456789abcdef",
        "uncommitted_changes": False,
        "device": {"platform": "gpu", "kind": "an invented GPU"},
        "versions": {"jax": "0.0", "torch": None},
    }
    limits = {"bytes_per_second": 1e12, "flops_per_second": 1e14, "dtype": "bfloat16"}
    report = {"machine": machine, "limits": limits, "rows": rows, "peers": [], "tuned": []}
    return report | {"problems": [], "table": None} | changes
