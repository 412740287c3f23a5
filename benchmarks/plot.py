"""Draw the results and fill their tables into docs/benchmarks.md.

    python benchmarks/plot.py

Writes PNG and SVG beside the JSON files, and what stands between the markers of the document.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BOUND_COLOR = "#c0392b"
COLORS = {
    "jaxwna16 W4A16": "#0b6e4f",
    "jaxwna16": "#0b6e4f",
    "jaxwna16 float32": "#7fb59f",
    "transformers float32": "#b0b0b0",
    "transformers, mapped": "#c8c8c8",
    "transformers, first use": "#8f8f8f",
    "jaxwna16, converted": "#12a06f",
    "plain read": "#e8d9b5",
    "plain read, converted": "#f3ead3",
    "read and kept, converted": "#d9c48f",
}


def main() -> None:
    """Draw every result that is there."""
    for name, draw in (("language_speed", draw_speed), ("loading", draw_loading)):
        path = RESULTS / f"{name}.json"
        if not path.exists():
            print(f"{path} is missing: run benchmarks/{name}.py", file=sys.stderr)
            continue
        figure = draw(json.loads(path.read_text()))
        for suffix in ("png", "svg"):
            figure.savefig(
                path.with_suffix(f".{suffix}"),
                dpi=150,
                metadata={"Date": None} if suffix == "svg" else None,
            )
            print(path.with_suffix(f".{suffix}"))
        fill(name, tabulate(json.loads(path.read_text())))


def draw_speed(result: dict[str, Any]) -> Figure:
    """Tokens per second of each engine; whiskers from least to most."""
    keys = ("decode, batch 1", "decode, batch 4", "prefill, batch 1", "prefill, batch 4")
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.8), layout="constrained")
    for axis, key in zip(axes, keys, strict=True):
        bars = {name: result["samples"][key][name] for name in result["samples"][key]}
        draw_bars(axis, bars, "{:.0f}")
        ratio = result["ratios_to_transformers"][key]["jaxwna16 W4A16"]["median"]
        axis.set_title(f"{key}\nW4A16: {ratio:.2f}× transformers", fontsize=10)
    axes[0].set_ylabel("tokens per second")
    add_legend(figure, result["samples"][keys[0]])
    figure.suptitle(
        f"SmolLM2-135M on CPU, {result['prompt_tokens']} prompt tokens, "
        f"{result['new_tokens']} new ones ({describe(result)})",
        fontsize=11,
    )
    return figure


def draw_loading(result: dict[str, Any]) -> Figure:
    """Seconds and peak memory of each loader; the line is the bound that jaxwna16 promises."""
    checkpoints = result["checkpoints"]
    figure, axes = plt.subplots(
        2, len(checkpoints), figsize=(3 * len(checkpoints), 6), layout="constrained"
    )
    for column, (name, checkpoint) in enumerate(checkpoints.items()):
        loaders = checkpoint["loaders"]
        seconds = {n: [s["seconds"] for s in row["samples"]] for n, row in loaders.items()}
        memory = {n: [s["peak_bytes"] / 1e6 for s in row["samples"]] for n, row in loaders.items()}
        draw_bars(axes[0][column], seconds, "{:.2f}")
        draw_bars(axes[1][column], memory, "{:.0f}")
        bound = checkpoint["memory_bound_bytes"] / 1e6
        axes[1][column].axhline(bound, color=BOUND_COLOR, linewidth=1)
        axes[1][column].set_ylim(top=max(axes[1][column].get_ylim()[1], 1.1 * bound))
        title = name.replace(", ", "\n", name.count(", ") - 1)
        axes[0][column].set_title(f"{title}\n{checkpoint['bytes'] / 1e6:.0f} MB", fontsize=10)
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("peak memory, MB")
    bound_line = Line2D([], [], color=BOUND_COLOR, label="bound that jaxwna16 promises")
    add_legend(figure, next(iter(checkpoints.values()))["loaders"], bound_line)
    figure.suptitle(
        f"Loading a packed checkpoint, warm page cache ({describe(result)})", fontsize=11
    )
    return figure


def draw_bars(axis: Any, bars: dict[str, list[float]], label: str) -> None:
    """One bar a name at its median, with least and most as whiskers."""
    for position, (name, values) in enumerate(bars.items()):
        middle = statistics.median(values)
        reach = [[middle - min(values)], [max(values) - middle]]
        axis.bar(position, middle, color=COLORS[name], yerr=reach, ecolor="#444444", capsize=3)
        axis.annotate(
            label.format(middle),
            (position, max(values)),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axis.set_xticks([])
    axis.margins(y=0.18)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Figure, names: Any, *others: Line2D) -> None:
    """Who is who, below the picture."""
    patches = [Rectangle((0, 0), 1, 1, color=COLORS[name], label=name) for name in names]
    handles = [*patches, *others]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)


def describe(result: dict[str, Any]) -> str:
    """Machine and versions in a few words."""
    machine = result["machine"]
    versions = machine["versions"]
    return (
        f"{machine['cores']} cores of {machine['processor']}, jax {versions['jax']}, "
        f"transformers {versions['transformers']}"
    )


def tabulate(result: dict[str, Any]) -> str:
    """The figures of a result as a Markdown table, with the run they come from."""
    if "samples" in result:
        lines = ["| case | engine | tokens/s (median) | least - most | ratio to transformers |"]
        lines += ["|---|---|---:|---:|---:|"]
        for case, engines in result["samples"].items():
            for name, values in engines.items():
                ratio = result["ratios_to_transformers"][case].get(name)
                times = f"{ratio['median']:.2f}" if ratio else ""
                middle = statistics.median(values)
                spread = f"{min(values):.1f} - {max(values):.1f}"
                lines.append(f"| {case} | {name} | {middle:.1f} | {spread} | {times} |")
    else:
        lines = ["| checkpoint | loader | seconds | GB/s | peak MB | promised bound MB |"]
        lines += ["|---|---|---:|---:|---:|---:|"]
        for name, checkpoint in result["checkpoints"].items():
            for loader, row in checkpoint["loaders"].items():
                ours = loader == "jaxwna16"
                bound = f"{checkpoint['memory_bound_bytes'] / 1e6:.0f}" if ours else ""
                lines.append(
                    f"| {name} | {loader} | {row['seconds']:.2f} "
                    f"| {row['gigabytes_per_second']:.2f} "
                    f"| {row['peak_bytes'] / 1e6:.0f} | {bound} |"
                )
    return "\n".join([*lines, "", tell_origin(result["machine"])])


def tell_origin(machine: dict[str, Any]) -> str:
    """The run that a table comes from: date, commit, machine and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['date']}, commit {machine['commit'][:10]}, {machine['cores']} cores of "
        f"{machine['processor']}, Python {machine['python']}, {versions}."
    )


def fill(name: str, text: str) -> None:
    """Replace what stands between the markers of a result in the document."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(begin)
    _, _, tail = rest.partition(end)
    DOCUMENT.write_text(f"{head}{begin}{text}\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
