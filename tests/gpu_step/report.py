"""docs/step.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.gpu_step.readings import BEGIN, END, Program, Reading

REPORT = Path(__file__).parents[2] / "docs" / "step.md"


def list_kernels_of(reading: Reading) -> Iterator[str]:
    """Lines for a terminal: a layer of each kind, and what is around the layers."""
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in reading.seconds.items())
    yield (
        f"  {sum(k.launches for k in reading.kernels)} kernels a step "
        f"({sum(k.launches for k in reading.sampled)} with top-k and top-p), "
        f"{reading.command_buffers} command buffers, temporaries {reading.temporaries / 1e6:.1f} MB"
        f", {seconds}"
    )
    typical = {reading.find_typical(kind): kind for kind in dict.fromkeys(reading.kinds)}
    for layer, title in {BEGIN: "before", **typical, END: "after"}.items():
        kernels = reading.list_layer(layer)
        yield f"  {title}: {sum(k.launches for k in kernels)} kernels"
        for k in kernels:
            marks = ["" if k.is_recorded else "not in a command buffer"]
            marks += ["COPIES A CACHE"] * k.copies_cache + [f"{k.scores} SCORES"] * bool(k.scores)
            yield (
                f"    {k.launches:3d} x {k.describe():60.60s} programs {k.programs:6d} read "
                f"{k.read / 1e6:9.3f} MB written {k.written / 1e6:8.3f} MB {' '.join(marks)}"
            )


def write_report(results: list[tuple[Program, Reading | str]]) -> str:
    raise NotImplementedError
