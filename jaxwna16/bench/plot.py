"""The roofline plot: time of a product against the number of tokens, one panel a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxwna16.bench.report import describe_limits
from jaxwna16.bench.run import OURS, Row, find_median
from jaxwna16.extras import import_extra

COLORS = {
    OURS: "#0b6e4f",
    "bf16": "#4c72b0",
    "xla": "#9a9a9a",
    "torch bf16": "#8fb3e0",
    "tinygemm": "#c44e52",
    "gemlite": "#dd8452",
    "humming": "#8c5fb0",
    "conch": "#b58900",
    "torch grouped": "#8fb3e0",
    "tokamax": "#dd8452",
}
NAMES = {OURS: "jaxwna16", "bf16": "bf16 product (jnp.dot)", "xla": "XLA: dequantize, then dot"}
_MOE_NAMES = {
    "bf16": "XLA: bf16, expert by expert",
    "xla": "XLA: dequantize, expert by expert",
}
_OTHER_COLOR = "#555555"
_LIMIT_COLOR = "#222222"
_COLUMNS = 4
_FEW = 3
_NEAR = 0.7


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the plot, in the format that the ending of `path` says.

    Raises:
      InputError: if matplotlib is not installed.
    """
    matplotlib: Any = import_extra("matplotlib", "plot")
    matplotlib.use("Agg")
    pyplot: Any = import_extra("matplotlib.pyplot", "plot")
    panels = _group_rows(report["rows"])
    columns = min(_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (max(8.0, 3.7 * columns), 3.2 * lines + 1.5)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=size, layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for place, (axis, rows) in enumerate(zip(axes.flat, panels, strict=False)):
        _draw_panel(axis, rows, report["limits"])
        if place % columns == 0:
            axis.set_ylabel("microseconds per product")
        if place + columns >= len(panels):
            axis.set_xlabel("tokens")
    _add_legend(figure, axes.flat[: len(panels)], max(2, columns))
    product = "x[M, K] · Wᵀ" if "in_features" in panels[0][0] else "of the chosen experts"
    figure.suptitle(
        f"Time of one product {product}, weight from memory: lower is better, "
        f"grey is out of reach\n{describe_limits(report)}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _group_rows(rows: Sequence[Row]) -> list[list[Row]]:
    """The measured rows of each weight; a weight timed at few M only if there is no other."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["figures"]:
            keys = ("shape", "bits", "group_size", "symmetric")
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    full = [group for group in groups.values() if len(group) >= _FEW]
    return full or list(groups.values())


def _draw_panel(axis: Any, rows: list[Row], limits: dict[str, Any]) -> None:
    tokens = [row["tokens"] for row in rows]
    bounds = [row["limit_seconds"] * 1e6 for row in rows]
    series = {}
    for name in dict.fromkeys(name for row in rows for name in (*row["engines"], *row["peers"])):
        points = [(row["tokens"], find_median(row, name)) for row in rows]
        found = [(m, seconds * 1e6) for m, seconds in points if seconds]
        if found:
            series[name] = found
    highest = max(value for found in series.values() for _, value in found)
    lowest = min(bounds) / 1.8
    axis.fill_between(tokens, bounds, lowest, color="#d9d9d9", zorder=0, linewidth=0)
    axis.plot(tokens, bounds, color=_LIMIT_COLOR, linewidth=1.2, zorder=1, label="limit")
    names = NAMES | (_MOE_NAMES if "experts_touched" in rows[0] else {})
    for name, found in series.items():
        ours = name == OURS
        axis.plot(
            *zip(*found, strict=True),
            color=COLORS.get(name, _OTHER_COLOR),
            marker="o" if ours else ".",
            markersize=5 if ours else 4,
            linewidth=2.2 if ours else 1.1,
            linestyle="-" if len(found) == len(rows) else ":",
            zorder=4 if ours else 2,
            label=names.get(name, name),
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_ylim(lowest, highest * 1.6)
    axis.set_xticks(tokens[:: 1 if len(tokens) < 8 else 2])
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.tick_params(which="both", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(_word_title(rows), fontsize=9)
    _mark_turn(axis, rows, limits)
    # below the point, unless the limit's own line is there
    near = rows[0]["figures"]["limit_share"] > _NEAR
    _annotate_share(axis, rows[0], (9, 5 if near else -12), "center")
    if len(rows) > 1:
        _annotate_share(axis, rows[-1], (-8, 3), "right")


def _word_title(rows: list[Row]) -> str:
    row = rows[0]
    symmetry = "symmetric" if row["symmetric"] else "asymmetric"
    channel = row["group_size"] in (-1, row.get("in_features"))
    group = "channel" if channel else f"groups of {row['group_size']}"
    title = row["shape"]
    if "in_features" in row:
        title = f"K={row['in_features']}  N={row['out_features']}"
    return f"{title}\n{row['bits']} bits, {group}, {symmetry}"


def _mark_turn(axis: Any, rows: list[Row], limits: dict[str, Any]) -> None:
    """A line where the limit changes from reading the weight to computing."""
    compute_bound = [
        row["flops"] / limits["flops_per_second"] > row["bytes"] / limits["bytes_per_second"]
        for row in rows
    ]
    if True in compute_bound and not compute_bound[0]:
        place = compute_bound.index(True)
        turn = math.sqrt(rows[place - 1]["tokens"] * rows[place]["tokens"])
        axis.axvline(turn, color="#888888", linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
        for text, side, shift in (("memory", "right", -3), ("arithmetic", "left", 3)):
            axis.annotate(
                text,
                (turn, 0.985),
                xycoords=("data", "axes fraction"),
                xytext=(shift, 0),
                textcoords="offset points",
                ha=side,
                va="top",
                fontsize=7,
                color="#666666",
            )


def _annotate_share(axis: Any, row: Row, shift: tuple[int, int], side: str) -> None:
    """Write beside a point of ours how much of the limit it reaches."""
    seconds = find_median(row, OURS)
    if seconds:
        axis.annotate(
            f"{row['figures']['limit_share']:.0%}",
            (row["tokens"], seconds * 1e6),
            xytext=shift,
            textcoords="offset points",
            ha=side,
            fontsize=8,
            fontweight="bold",
            color=COLORS[OURS],
            zorder=5,
        )


def _add_legend(figure: Any, axes: Sequence[Any], columns: int) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    limit = handles.pop("limit")
    handles["limit of this machine (and % of it reached)"] = limit
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
