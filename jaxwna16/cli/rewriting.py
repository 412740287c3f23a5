"""The report of `quantize` and `dequantize` on the checkpoint that they made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from loaders.errors import escape_line
from loaders.plan import make_plan


def compare(
    source: Path, destination: Path, seconds: float, *, follow_links: bool
) -> dict[str, Any]:
    """Sizes of both checkpoints; `modules` counts the quantized modules of both."""
    old, new = make_plan(source, follow_links=follow_links), make_plan(destination)
    return {
        "source": str(source),
        "destination": str(destination),
        "modules": len(old.quantized) + len(new.quantized),
        "source_bytes": old.nbytes,
        "bytes": new.nbytes,
        "ratio": old.nbytes / new.nbytes,
        "seconds": seconds,
    }


def show_sizes(report: dict[str, Any], console: Console) -> None:
    """Print both sizes, their ratio and the new folder."""
    ratio = report["ratio"]
    change = f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger"
    console.print(
        f"{decimal(report['source_bytes'])} -> {decimal(report['bytes'])}, {change}, "
        f"in {report['seconds']:.1f} s"
    )
    console.print(escape_line(f"made {report['destination']}"))
