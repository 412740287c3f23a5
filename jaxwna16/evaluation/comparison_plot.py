"""The plot of a comparison: quality against bytes, one panel for perplexity and one for KL."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxwna16.errors import InputError
from jaxwna16.extras import import_extra

_SUFFIXES = (".png", ".svg", ".pdf")
_COLORS = {"asymmetric": ("#0b6e4f", "#6dbb9b"), "symmetric": ("#dd8452", "#f1bd9d")}
_OTHER_COLORS = ("#4c72b0", "#9ab3d9")
_LINE_COLOR = "#444444"
_NEAR = 1.25  # times the smallest: what is larger would push the others into a corner
_TICKS = (1, 1.5, 2, 3, 4, 5, 6, 8)


def check_target(path: str) -> None:
    """Check before the work is done that its plot can be drawn and written.

    Raises:
      InputError: if matplotlib is not installed, the ending is not that of a format, the folder is
        missing, or the file cannot be written.
    """
    import_extra("matplotlib", "plot")
    target = Path(path)
    if target.suffix not in _SUFFIXES:
        raise InputError(f"--plot {path}: the name must end in one of {', '.join(_SUFFIXES)}")
    if not target.parent.is_dir():
        raise InputError(f"--plot {path}: there is no folder {target.parent}")
    if target.is_dir():
        raise InputError(f"--plot {path}: this is a folder, give the name of a file")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise InputError(f"--plot {path}: cannot be written")


def draw(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw rows of a comparison (docs/cli.md); the first is a line to compare the others with.

    Raises:
      InputError: if matplotlib is not installed, or the file cannot be written.
    """
    matplotlib: Any = import_extra("matplotlib", "plot")
    matplotlib.use("Agg")
    pyplot: Any = import_extra("matplotlib.pyplot", "plot")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    first = rows[0]["name"]
    _draw_panel(axes[0], rows, "perplexity", "perplexity")
    _draw_panel(axes[1], rows, "kl_divergence", "KL divergence from the first, nats per token")
    figure.suptitle(title or f"{first} and other checkpoints of it: lower is better")
    metadata = {"Date": None} if str(path).endswith(".svg") else None
    try:
        figure.savefig(path, dpi=150, metadata=metadata)
    except OSError as error:
        raise InputError(f"{path}: the plot cannot be written: {error}") from error
    finally:
        pyplot.close(figure)


def _draw_panel(axis: Any, rows: Sequence[Mapping[str, Any]], key: str, label: str) -> None:
    """Points for checkpoints near the smallest one's size, lines for the first and larger ones."""
    others = [row for row in rows[1:] if row[key]]
    limit = _NEAR * min((row["bytes"] for row in others), default=0)
    near = [row for row in others if row["bytes"] <= limit]
    _draw_points(axis, near, key)
    lowest = min((row[key] for row in near), default=0.0)
    for row in [rows[0], *(row for row in others if row["bytes"] > limit)]:
        if not row[key]:
            continue
        text = f"{row['name']}, {row['bytes'] / 1e6:.0f} MB: {row[key]:.4g}"
        style = {"color": _LINE_COLOR, "linewidth": 1, "linestyle": "--" if row is rows[0] else ":"}
        if row[key] > lowest / 2:
            axis.axhline(row[key], **style, label=text, zorder=1)
        else:  # a line so far below would squeeze the points: only the legend has it
            axis.plot([], [], **style, label=f"{text} (below)")
    axis.set_xlabel("checkpoint, MB")
    axis.set_ylabel(label)
    axis.grid(axis="y", color="#eeeeee", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    if not any(row[key] for row in rows):  # of equal checkpoints
        axis.text(0.5, 0.5, "none above 0", transform=axis.transAxes, ha="center")
        return
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    ticks = [tick * 10.0**power for power in range(-9, 10) for tick in _TICKS]
    axis.set_yticks([tick for tick in ticks if low <= tick <= high])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.margins(x=0.16, y=0.1)
    axis.legend(frameon=False, fontsize=9, loc="upper right")


def _draw_points(axis: Any, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    """A line for each kind, "W4 asymmetric"; names where the scheme does not tell points apart."""
    distinct = len({row["scheme"] for row in rows}) == len(rows)
    colors = {name: iter(shades) for name, shades in [*_COLORS.items(), ("", _OTHER_COLORS)]}
    for kind, members in sorted(_group_rows(rows).items()):
        symmetry = kind.rpartition(" ")[2]
        color = next(colors[symmetry if symmetry in colors else ""], _LINE_COLOR)
        sizes = [row["bytes"] / 1e6 for row in members]
        axis.plot(sizes, [row[key] for row in members], "o-", color=color, label=kind, zorder=3)
        for row, size in zip(members, sizes, strict=True):
            axis.annotate(
                row["scheme"].removeprefix(kind).strip() if distinct else row["name"],
                (size, row[key]),
                xytext=(1, -15) if symmetry == "asymmetric" else (5, 5),
                textcoords="offset points",
                ha="right" if symmetry == "asymmetric" else "left",
                fontsize=9,
                color=color,
            )


def _group_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows by kind, each from the smallest to the largest."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["bytes"]):
        kind = re.sub(r" (g\d+|channel)$", "", row["scheme"])
        groups.setdefault(kind, []).append(row)
    return groups
