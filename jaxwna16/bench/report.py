"""The result as tables: on the terminal and as Markdown, from the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxwna16.bench.engines import CHAINED, SINGLE
from jaxwna16.bench.run import GROUPING, OURS, Row, find_timing
from jaxwna16.bench.targets import NONE, judge_targets, word_measured

Cells = list[list[str]]

LEGEND = (
    "chained: one product of a chain in one compiled program, weights cold, with or without CUDA "
    "graphs, whichever is faster; single: one call of a program of one product, the calls queued "
    "without waiting, no CUDA graph. Both are medians. "
    "± is half the distance from the fastest to the slowest batch. GB/s counts packed "
    "integers, scales, zero points, x and the result once; shares are of this run's copy bandwidth "
    "and bf16 product rate. Columns ending in x say how many times as fast ours is."
)


MOE_LEGEND = (
    "Experts: one product is gate and up, activation, down and the sum over the chosen experts, "
    "without the router. touched: experts that some token has chosen; GB/s counts their weights. "
    "grouping: the time to find the tokens of each expert, in a chain of its own, and its share of "
    "the whole."
)


STEP_LEGEND = (
    "A step: tokens are rows, each of which gets one. Attention is all between its products; half "
    "of the C slots are seen. A layer is the mean of a chain. One program loops over them on the "
    "device, as a model does. Other attentions neither rotate nor write the cache."
)


def tabulate_rows(rows: Sequence[Row]) -> Cells:
    """A header, then one line a case."""
    others = list(
        dict.fromkeys(name for row in rows for name in row["times_as_fast_as"] if name != OURS)
    )
    several = {
        key for key in ("bits", "symmetric", "group_size") if len({r[key] for r in rows}) > 1
    }
    header = ["shape", "tokens", *(["weight"] if several else []), "chained us", "±", "single us"]
    header += ["GB/s", "copy", "TFLOP/s", "rate", "limit", *(f"{name} x" for name in others)]
    experts = any("experts_touched" in row for row in rows)
    lines = [_list_cells(row, bool(several), others) for row in rows]
    if experts:
        header += ["touched", "grouping us", "share"]
        lines = [[*line, *_list_moe_cells(row)] for line, row in zip(lines, rows, strict=True)]
    return [header, *lines]


def _list_moe_cells(row: Row) -> list[str]:
    grouping = row["parts"].get(GROUPING, {})
    touched = f"{row['experts_touched']:.3g}"
    if CHAINED not in grouping:
        return [touched, NONE, NONE]
    share = f"{grouping['share']:.0%}" if "share" in grouping else NONE
    return [touched, _word_time(grouping[CHAINED]["median"]), share]


def word_legend(rows: Sequence[Row]) -> str:
    """What the columns of `tabulate_rows` mean."""
    if any("slots" in row for row in rows):
        return f"{LEGEND} {STEP_LEGEND}"
    experts = any("experts_touched" in row for row in rows)
    return f"{LEGEND} {MOE_LEGEND}" if experts else LEGEND


def _list_cells(row: Row, names_weight: bool, others: list[str]) -> list[str]:
    cells = [row["shape"], str(row["tokens"])]
    if names_weight:
        cells.append(word_weight(row))
    figures, chained = row["figures"], find_timing(row, OURS)
    if figures is None or chained is None:
        return [*cells, *[NONE] * (8 + len(others))]
    spread = (chained["most"] - chained["least"]) / 2
    single = row["engines"][OURS].get(SINGLE)
    cells += [_word_time(chained["median"]), _word_time(spread)]
    cells.append(_word_time(single and single["median"]))
    cells += [
        f"{figures['gigabytes_per_second']:.0f}",
        f"{figures['bandwidth_share']:.0%}",
        f"{figures['teraflops_per_second']:.3g}",
        f"{figures['compute_share']:.0%}",
        f"{figures['limit_share']:.0%}",
    ]
    ratios = row["times_as_fast_as"]
    return cells + [f"{ratios[name]:.2f}" if name in ratios else NONE for name in others]


def word_weight(row: Row) -> str:
    """ "W4 g128 asym"."""
    group = "channel" if row["group_size"] == -1 else f"g{row['group_size']}"
    return f"W{row['bits']} {group} {'sym' if row['symmetric'] else 'asym'}"


def _word_time(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{seconds * 1e6:.{0 if seconds >= 1e-4 else 1 if seconds >= 1e-5 else 2}f}"


def tabulate_targets(rows: Sequence[Row]) -> Cells:
    """A header, then one line a target."""
    lines = judge_targets(rows)
    peers = list(dict.fromkeys(name for line in lines for name in line["microseconds"]))
    marks = {None: "", True: "yes", False: "no"}
    return [
        ["case", "target", "measured", "reached", *(f"{name} us" for name in peers), "published"],
        *(
            [
                line["case"],
                line["target"],
                word_measured(line),
                marks[line["reached"]],
                *(_word_number(line["microseconds"].get(name)) for name in peers),
                line["published"],
            ]
            for line in lines
        ),
    ]


def _word_number(number: float | None) -> str:
    return NONE if number is None else f"{number:.3g}"


def tabulate_tuned(tuned: Sequence[dict[str, Any]]) -> Cells:
    """A header, then one line a case that was tuned."""
    return [
        ["shape", "tokens", "weight", "tried", "failed", "rule us", "best us", "gain", "best"],
        *(
            [
                found["shape"],
                str(found["tokens"]),
                word_weight(found),
                str(found["candidates"]),
                str(len(found["failures"])),
                _word_time(found["rule_seconds"]),
                _word_time(found["best_seconds"]),
                _word_gain(found),
                found["best"] or "none works",
            ]
            for found in tuned
        ),
    ]


def _word_gain(found: dict[str, Any]) -> str:
    if not found["rule_seconds"] or not found["best_seconds"]:
        return NONE
    return f"{found['rule_seconds'] / found['best_seconds'] - 1:.0%}"


def list_problems(report: dict[str, Any]) -> list[str]:
    """All problems, one a line; a problem of several cases is listed once, with their number."""
    counted: dict[str, int] = {}
    for row in report["rows"]:
        for name, found in (row["engines"] | row["parts"] | row["peers"]).items():
            if found.get("error"):
                text = f"{name}: {found['error']}"
                counted[text] = counted.get(text, 0) + 1
    lines = [f"{text} ({count} of the cases)" for text, count in counted.items()]
    for peer in report["peers"]:
        if peer["absent"]:
            lines.append(f"peer {peer['name']} is absent: {peer['absent']}")
        if peer["error"]:
            lines.append(f"peer {peer['name']}: {peer['error']}")
    return lines


def describe_limits(report: dict[str, Any]) -> str:
    """The device and what it can do, in a line."""
    machine, limits = report["machine"], report["limits"]
    versions = machine["versions"]
    words = f"{machine['device']['kind']}, jax {versions['jax']}"
    if limits:
        words += (
            f"; measured copy {limits['bytes_per_second'] / 1e12:.3g} TB/s, "
            f"{limits['dtype']} product {limits['flops_per_second'] / 1e12:.3g} TFLOP/s"
        )
    return words


def write_markdown(report: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    commit = (machine["commit"] or "unknown")[:10]
    dirty = " and uncommitted changes" if machine["uncommitted_changes"] else ""
    parts = ["# Kernels", describe_limits(report) + "."]
    parts.append(f"{machine['date']}, commit {commit}{dirty}, {versions}.")
    if report["tuned"]:
        parts += ["## Tuned tiles", _format_table(tabulate_tuned(report["tuned"]))]
    if report["rows"]:
        targets = tabulate_targets(report["rows"])
        parts += ["## Targets", _format_table(targets, 1)] if targets[1:] else []
        parts += [
            "## Cases",
            word_legend(report["rows"]),
            _format_table(tabulate_rows(report["rows"])),
        ]
    if report["problems"]:
        parts += ["## Problems", "\n".join(f"- {line}" for line in report["problems"])]
    return "\n\n".join(parts) + "\n"


def _format_table(cells: Cells, words: int = 0) -> str:
    """Markdown; numbers are aligned to the right, except in a table of words."""
    header, *lines = ([text.replace("|", "\\|") for text in row] for row in cells)
    rule = ["---" if words or place == 0 else "---:" for place in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *lines])
