"""Quantize SmolLM2 in seven ways and compare all with the float model: quality against bytes.

    python benchmarks/compare_smollm2.py

On 16 windows of 512 tokens from the middle of Persuasion, in float32 (`jaxwna16 eval compare` with
`--windows 16`). Writes benchmarks/results/compare_smollm2.json, .png and .svg, and the table
between the markers of README.md. The checkpoints (1.3 GB) are made anew in `.cache/compare`.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

TEXT = ROOT / "examples" / "data" / "persuasion.txt"
FOLDER = ROOT / ".cache" / "compare"
README = ROOT / "README.md"
WINDOW, WINDOWS = 512, 16
CHANNEL = -1
SCHEMES = (
    (8, CHANNEL, True),
    *((4, size, symmetric) for size in (32, 64, CHANNEL) for symmetric in (True, False)),
)


def main() -> None:
    """Make the checkpoints, compare them, write and draw the result."""
    import jaxwna16
    from benchmarks.machine import RESULTS, write_result
    from examples.fetch_smollm2 import fetch
    from jaxwna16.comparison import compare_checkpoints, open_plans
    from jaxwna16.evaluation.comparison_plot import draw
    from jaxwna16.evaluation.perplexity import read_text

    source = fetch()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    text = read_text(TEXT)
    text = text[len(text) // 2 :]
    plans = open_plans([source, *(quantize(source, *scheme) for scheme in SCHEMES)], text)
    tokens = jaxwna16.Tokenizer.from_folder(source).encode(text)
    rows = []
    for row in compare_checkpoints(
        plans, tokens, dtype="float32", window=WINDOW, max_windows=WINDOWS, progress=None
    ):
        rows.append(dataclasses.asdict(row) | {"folder": str(Path(row.folder).name)})
        print(f"{row.name:26} {row.bytes / 1e6:6.1f} MB  perplexity {row.perplexity:7.2f}")
    facts = {"text": TEXT.name, "window": WINDOW, "windows": WINDOWS}
    print(write_result("compare_smollm2", {**facts, "rows": rows}))
    for suffix in ("png", "svg"):
        path = RESULTS / f"compare_smollm2.{suffix}"
        draw(
            rows, path, "SmolLM2-135M-Instruct, rounded to nearest: zero points for almost no bytes"
        )
        print(path)
    fill_readme(tabulate(rows))


def quantize(source: Path, bits: int, group_size: int, symmetric: bool) -> Path:
    """Write one version of the model, rounding to nearest."""
    import jaxwna16

    size = "channel" if group_size == CHANNEL else f"g{group_size}"
    destination = FOLDER / f"W{bits}-{'sym' if symmetric else 'asym'}-{size}"
    jaxwna16.quantize_checkpoint(
        source, destination, bits=bits, group_size=group_size, symmetric=symmetric
    )
    return destination


def tabulate(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| weights | MB | perplexity | KL to float32 | same top-1 |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['scheme']} | {row['bytes'] / 1e6:.1f} | {row['perplexity']:.2f} "
        f"| {row['kl_divergence']:.3f} | {row['top1_agreement']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


def fill_readme(table: str) -> None:
    """Replace what stands between the markers."""
    begin, end = "<!-- compare_smollm2 -->\n", "<!-- /compare_smollm2 -->"
    head, _, rest = README.read_text(encoding="utf-8").partition(begin)
    _, _, tail = rest.partition(end)
    README.write_text(f"{head}{begin}{table}\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
