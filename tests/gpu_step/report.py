"""docs/step.md, and lists for a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.gpu_step.budgets import BUDGET_BATCHES, BUDGETS, find_faults
from tests.gpu_step.readings import (
    BEGIN,
    DECODE_POSITION,
    DECODE_SLOTS,
    END,
    Kernel,
    Program,
    Reading,
)
from tests.gpu_step.time_model import (
    GUESSES,
    MACHINES,
    count,
    count_must_move,
    find_limit,
    predict_step,
    spread,
)

REPORT = Path(__file__).parents[2] / "docs" / "step.md"
_HEAD = """# A step, without a GPU

Made by `make gpu-step`; not edited by hand. XLA compiles the programs of generation, `decode` and
`prefill`, of published models for GPUs that are not there, and `tests/gpu_step` reads what it made:
kernels, the bytes that they move, command buffers. **Times are predictions of a model with guesses,
never measurements.** jax {jax}.

Weights are W4A16, asymmetric, in groups of 128; heads, embeddings and routers are bfloat16, and so
are the linears of delta nets, which published checkpoints leave plain ("all packed": not these).
{layers} layers are compiled. What is said of a whole step counts a layer between two others as
often as the model has such layers. Decoding: {slots} slots, of which {position} are seen. Prefill:
one piece of one row, no tokens before it. XLA tries products in several ways where there is a GPU;
here it takes the first, so its own products may be other kernels there.

Bytes of a kernel: its operands and results, each once; of what XLA slices, gathers or updates in
place, that part; of experts, those that are touched on average if each token chooses at random;
of a cache, the seen slots if a Pallas kernel reads it (tests hold those bounds), and all of it
otherwise. What must move: each weight once, keys and values of the seen slots, those of the new
ones, a delta net's state in and out, and the stream in and out twice a layer.
"""


def write_report(results: Sequence[tuple[Program, Reading | str]], jax: str = "") -> str:
    """The whole document."""
    readings = [result for _, result in results if isinstance(result, Reading)]
    cut = [r for r in readings if r.program.layers]
    layers = max((len(r.kinds) for r in cut), default=0)
    facts = {"jax": jax, "layers": layers, "slots": DECODE_SLOTS, "position": DECODE_POSITION}
    lines = [_HEAD.format(**facts).rstrip()]
    faults = [
        (program, fault)
        for program, result in results
        for fault in ([result] if isinstance(result, str) else find_faults(result))
    ]
    if faults:
        lines += [
            "",
            "**Faults**",
            "",
            *(f"- {p}: {fault.splitlines()[-1]}" for p, fault in faults),
        ]
    lines += ["", "## Kernels of a layer", "", *_tabulate_layers(cut)]
    lines += ["", "## Kernels, bytes and memory of a step", "", *_tabulate_steps(cut)]
    lines += ["", "## Predicted times", "", *_tabulate_times(cut)]
    lines += ["", "## Compiling", "", *_tabulate_seconds(readings)]
    lines += ["", "## Which kernels", "", *_list_all(cut)]
    return "\n".join(lines) + "\n"


def _name(program: Program) -> str:
    return f"{program.kind} {program.size}"


def _tabulate_layers(readings: Sequence[Reading]) -> Iterator[str]:
    columns = list(dict.fromkeys((r.program.arch, _name(r.program)) for r in readings))
    titles = [f"{arch} {name}" for arch, name in columns]
    yield f"| layer | budget | {' | '.join(titles)} |"
    yield f"| --- | ---: |{' ---: |' * len(titles)}"
    rows: dict[tuple[str, str], dict[tuple[str, str], int]] = {}
    for r in readings:
        for kind in dict.fromkeys(r.kinds):
            launches = sum(k.launches for k in r.list_layer(r.find_typical(kind)))
            row = rows.setdefault((r.program.model, kind), {})
            row[r.program.arch, _name(r.program)] = launches
    for (model, kind), cells in rows.items():
        values = " | ".join(str(cells.get(column, "")) for column in columns)
        yield f"| {model}, {kind} | {BUDGETS.get((model, kind), '')} | {values} |"
    yield ""
    batches = " and ".join(map(str, BUDGET_BATCHES))
    yield f"Budgets hold for decoding with {batches} rows, and are tests."


def _tabulate_steps(readings: Sequence[Reading]) -> Iterator[str]:
    yield (
        "| program | kernels | with top-k, top-p | outside of command buffers | GB moved | GB that "
        "must move | ratio | temporaries, MB | copies of a cache | scores |"
    )
    yield "| --- |" + " ---: |" * 9
    for r in readings:
        p, parts = r.program, spread(r, r.kernels)
        kernels, sampled = count(parts, "launches"), count(spread(r, r.sampled), "launches")
        outside = sum(n * sum(not k.is_recorded for k in part) for n, part in parts)
        moved, must = (count(parts, "bytes"), count_must_move(r))
        copies, scores = (
            sum(getattr(k, name) > 0 for k in (*r.kernels, *r.sampled))
            for name in ("copies_cache", "scores")
        )
        cells = [
            f"{kernels:.0f}",
            f"{sampled:.0f}" if sampled else "",
            f"{outside:.0f}",
            f"{moved / 1e9:.2f}",
            f"{must / 1e9:.2f}",
            f"{moved / must:.2f}",
            f"{r.temporaries / 1e6:.0f}",
            str(copies),
            str(scores) if p.kind == "prefill" else "",
        ]
        yield f"| {p.model}, {p.arch}, {_name(p)} | {' | '.join(cells)} |"


def _tabulate_times(readings: Sequence[Reading]) -> Iterator[str]:
    yield "Guesses (times in µs), the same for both GPUs:"
    yield ""
    yield (
        "| | bandwidth of a large kernel | GB/s of one program | products | ramp | smallest kernel "
        "| gap | launch | host, a step |"
    )
    yield "| --- |" + " ---: |" * 8
    for name, g in GUESSES.items():
        yield (
            f"| {name} | {g.efficiency:.0%} | {g.program_rate / 1e9:.0f} | "
            f"{g.product_efficiency:.0%} | {g.ramp} | {g.least} | {g.gap} | {g.launch} | {g.host} |"
        )
    yield ""
    machines = "; ".join(
        f"{m.name} ({arch}): {m.bandwidth / 1e12:.2f} TB/s of a large copy (a guess), "
        f"{m.flops / 1e12:.0f} TFLOP/s (data sheet)"
        for arch, m in MACHINES.items()
    )
    yield (
        f"{machines}. The limit is the bytes that must move, or the products, at these rates. A "
        "kernel takes max(bytes / rate, products) + ramp, at least the smallest kernel, + gap."
    )
    yield ""
    yield ("Predicted tokens per second, and share of the limit; (s): drawn after top-k and top-p.")
    yield ""
    yield f"| program | limit, ms | {' | '.join(GUESSES)} |"
    yield "| --- | ---: |" + " ---: |" * len(GUESSES)
    for r in readings:
        yield _write_times(r, r.kernels, "")
        if r.program.kind == "decode":
            yield _write_times(r, r.sampled, " (s)")
            yield _write_times(r, r.kernels, " (g)")


def _write_times(reading: Reading, kernels: Sequence[Kernel], mark: str) -> str:
    p, machine = reading.program, MACHINES[reading.program.arch]
    limit = find_limit(reading, machine)
    cells = []
    for guesses in GUESSES.values():
        if "g" in mark:
            guesses = dataclasses.replace(guesses, host=0.0, launch=guesses.gap)
        seconds = predict_step(reading, kernels, machine, guesses)
        cells.append(f"{reading.tokens / seconds:,.0f} · {limit / seconds:.0%}")
    return f"| {p.model}, {p.arch}, {_name(p)}{mark} | {1e3 * limit:.2f} | {' | '.join(cells)} |"


def _tabulate_seconds(readings: Sequence[Reading]) -> Iterator[str]:
    yield "Seconds on the machine that made this page, which may have been busy with other things."
    yield ""
    yield "| program | layers | trace | lower | compile |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for r in readings:
        p, s = r.program, r.seconds
        parts = " | ".join(f"{s[name]:.1f}" for name in ("trace", "lower", "compile"))
        yield f"| {p.model}, {p.arch}, {_name(p)} | {len(r.kinds)} | {parts} |"


def _list_all(readings: Sequence[Reading]) -> Iterator[str]:
    wanted = {("decode", 1), ("prefill", 2048)}
    for r in readings:
        if r.program.arch == "sm_90a" and (r.program.kind, r.program.size) in wanted:
            yield f"### {r.program.model}, {_name(r.program)}, sm_90a"
            yield ""
            yield "| kernel | launches | programs | MB read | MB written |"
            yield "| --- | ---: | ---: | ---: | ---: |"
            for title, kernels in _list_parts(r):
                yield f"| **{title}** | {sum(k.launches for k in kernels)} | | | |"
                for k in kernels:
                    yield (
                        f"| {k.describe()} | {k.launches} | {k.programs or ''} | "
                        f"{k.read / 1e6:.3f} | {k.written / 1e6:.3f} |"
                    )
            yield ""


def _list_parts(reading: Reading) -> Iterator[tuple[str, list[Kernel]]]:
    """A layer of each kind, and what is around the layers."""
    yield "before the layers", reading.list_layer(BEGIN)
    for kind in dict.fromkeys(reading.kinds):
        yield f"a layer: {kind}", reading.list_layer(reading.find_typical(kind))
    yield "after the layers", reading.list_layer(END)


def list_kernels_of(reading: Reading) -> Iterator[str]:
    """Lines for a terminal."""
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in reading.seconds.items())
    yield (
        f"  {sum(k.launches for k in reading.kernels)} kernels a step "
        f"({sum(k.launches for k in reading.sampled)} with top-k and top-p), "
        f"{reading.command_buffers} command buffers, temporaries {reading.temporaries / 1e6:.1f} MB"
        f", {seconds}"
    )
    for title, kernels in _list_parts(reading):
        yield f"  {title}: {sum(k.launches for k in kernels)} kernels"
        for k in kernels:
            marks = ["" if k.is_recorded else "not in a command buffer"]
            marks += ["COPIES A CACHE"] * k.copies_cache + [f"{k.scores} SCORES"] * bool(k.scores)
            yield (
                f"    {k.launches:3d} x {k.describe():60.60s} programs {k.programs:6d} read "
                f"{k.read / 1e6:9.3f} MB written {k.written / 1e6:8.3f} MB {' '.join(marks)}"
            )
    machine = MACHINES[reading.program.arch]
    shares = ", ".join(
        f"{name} {find_limit(reading, machine) / predict_step(reading, kernels, machine, g):.0%}"
        for kernels in [reading.kernels]
        for name, g in GUESSES.items()
    )
    yield f"  predicted share of the limit for {reading.whole_layers} layers: {shares}"
