"""`jaxwna16 bench`: times the kernels on this machine, and finds its tiles."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxwna16.bench.shapes import (
    MOE_MODELS,
    STEP_MODELS,
    TINY_STEP,
    TOKENS,
    list_default_shapes,
    parse_counts,
    parse_group_size,
    parse_moe_shapes,
    parse_shapes,
    parse_step_models,
)
from jaxwna16.cli.arguments import CallError, add_json
from jaxwna16.cli.bench_files import draw, make_folder, write

if TYPE_CHECKING:
    from rich.console import Console

    from jaxwna16.bench.engines import AnyCase
    from jaxwna16.bench.run import Deadline, Row

_SECONDS = 180.0
_TUNING_SECONDS = 150.0
_PEER_SECONDS = 120.0
_CPU_TOKENS = [1, 16]
_CPU_SHAPES = "2048x2048"
_CPU_EXPERTS = "512x256x16x4"
_STEP_ROWS, _STEP_SLOTS = ((1, 16, 64), (1,)), ((4096,), (64,))
"""On a GPU, and on a CPU."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time packed products of linear layers or of experts on this machine's GPU. The report "
        "compares them with the GPU's own limits, the bf16 product and other projects' kernels. "
        "docs/benchmarks.md explains the figures."
    )
    parser.add_argument(
        "--shapes",
        metavar="KxN,...",
        type=parse_shapes,
        help="input x output features, or models (llama-3.1-8b, llama-3.3-70b, qwen3-30b-a3b); "
        "default: the linear layers of all three models, and four squares",
    )
    parser.add_argument(
        "--moe",
        metavar="MODEL,...",
        nargs="?",
        const=[],
        type=parse_moe_shapes,
        help="experts instead of linear layers: models, or hidden x intermediate x experts x top_k "
        f"(2048x768x128x8); default: {', '.join(MOE_MODELS)}",
    )
    parser.add_argument(
        "--step",
        metavar="MODEL,...",
        nargs="?",
        const=[],
        type=parse_step_models,
        help="what lies between the products of a decode step, a layer, and the whole step: models "
        f"(default: {', '.join(STEP_MODELS)})",
    )
    parser.add_argument(
        "--slots",
        metavar="C,...",
        type=parse_counts,
        help="with --step, room in the cache, half of it seen (default: 4096)",
    )
    parser.add_argument(
        "--tokens",
        metavar="M,...",
        type=parse_counts,
        help="rows of x (default: powers of two up to 4096)",
    )
    parser.add_argument(
        "--bits", type=parse_counts, metavar="4,8", help="bits per weight (default: 4)"
    )
    parser.add_argument(
        "--group-size",
        metavar="G",
        type=parse_group_size,
        default=128,
        help="input features that share a scale, or channel (default: 128)",
    )
    parser.add_argument("--symmetric", action="store_true", help="without zero points")
    parser.add_argument(
        "--asymmetric",
        action="store_true",
        help="with zero points (the default); both options: time both",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16"),
        default="bfloat16",
        help="dtype of x and the scales (default: bfloat16)",
    )
    parser.add_argument(
        "--peers", action="store_true", help="also time installed kernels of other projects"
    )
    parser.add_argument(
        "--tune", action="store_true", help="find the fastest tiles for this GPU; time no cases"
    )
    parser.add_argument(
        "--table",
        metavar="FILE",
        type=Path,
        help="file for the tiles of --tune; default: the file where the kernels look for them",
    )
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=float,
        help=f"start no new case after this time (default: {_SECONDS:.0f}, with --tune "
        f"{_TUNING_SECONDS:.0f})",
    )
    parser.add_argument(
        "--peer-seconds",
        metavar="S",
        type=float,
        default=_PEER_SECONDS,
        help=f"time for all peers together (default: {_PEER_SECONDS:.0f})",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, help="folder for JSON, tables and the plot"
    )
    parser.add_argument(
        "--cpu", action="store_true", help="without a GPU: time the XLA path on the CPU"
    )
    add_json(parser, sys.modules[__name__])


def run(args: argparse.Namespace) -> dict[str, Any]:
    from jaxwna16.bench.machine import describe_machine
    from jaxwna16.bench.report import list_problems
    from jaxwna16.cli.backends import spare_device_memory

    spare_device_memory()
    on_cpu = _check_call(args)
    if args.output is not None:
        make_folder(args.output)
    cases = _plan(args, on_cpu)
    report = {
        "machine": describe_machine(),
        "options": _describe_options(args),
        "limits": None,
        "rows": [],
        "peers": [],
        "tuned": [],
        "table": None,
        "problems": [],
        "files": [],
    }
    with _show_progress() as say:
        # after each part, so that an interrupted run keeps the parts before
        measure = _tune if args.tune else _bench
        for found in measure(args, cases, on_cpu, say):
            report |= found
            report["problems"] = list_problems(report)
            if args.output is not None:
                write(report, args)
    if args.output is not None:
        draw(report, args)
    return report


def judge(report: dict[str, Any]) -> int:
    """1 if one of our own cases failed, or if no candidate of a tuned case works."""
    from jaxwna16.bench.run import count_failures

    unusable = any(found["best"] is None for found in report["tuned"])
    return int(bool(count_failures(report["rows"])) or unusable)


def show(report: dict[str, Any], console: Console) -> None:
    from jaxwna16.bench.report import (
        describe_limits,
        tabulate_rows,
        tabulate_targets,
        tabulate_tuned,
        word_legend,
    )
    from jaxwna16.cli.screen import make_table
    from loaders.errors import escape_line

    def print_table(cells: list[list[str]], *words: str) -> None:
        header, *lines = cells
        table = make_table(*header, numbers=tuple(t for t in header if t not in words))
        for line in lines:
            table.add_row(*line)
        console.print(table)

    console.print(describe_limits(report), style="bold")
    if report["tuned"]:
        print_table(tabulate_tuned(report["tuned"]), "best", "shape", "weight")
        console.print(f"{report['table']['entries']} entries in {report['table']['file']}")
    if report["rows"]:
        print_table(tabulate_rows(report["rows"]), "shape", "weight")
        console.print(word_legend(report["rows"]), style="dim")
        targets = tabulate_targets(report["rows"])
        if report["machine"]["device"]["platform"] == "gpu" and targets[1:]:
            print_table(targets, "case", "target", "measured", "published")
    for line in report["problems"]:
        console.print(escape_line(line))
    for file in report["files"]:
        console.print(f"wrote {file}")


def _check_call(args: argparse.Namespace) -> bool:
    """Whether the CPU is timed."""
    import jax

    if args.moe is not None and args.shapes:
        raise CallError("--shapes times linear layers, --moe times experts: give only one of them")
    if args.step is not None and (args.moe is not None or args.shapes or args.tune):
        raise CallError("--step times a decode step: give no --shapes, --moe or --tune with it")
    if args.slots and args.step is None:
        raise CallError("--slots is of the cache that --step reads: add --step")
    if args.table is not None and not args.tune:
        raise CallError("--table is the file that --tune writes: add --tune")
    for name in ("seconds", "peer_seconds"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise CallError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if args.bits is not None and not set(args.bits) <= {4, 8}:
        raise CallError(f"--bits must be 4, 8 or 4,8, got {','.join(map(str, args.bits))}")
    platform = jax.default_backend()
    if platform == "gpu":
        if args.cpu:
            raise CallError("--cpu is for machines without a GPU; JAX_PLATFORMS=cpu hides this one")
        return False
    if args.tune:
        raise CallError(f"--tune times kernels that run on an NVIDIA GPU; JAX sees only {platform}")
    if not args.cpu:
        raise CallError(
            f"JAX sees no GPU, only {platform}: there is no kernel to time. --cpu times the XLA "
            "path instead; `jaxwna16 doctor` says what this machine lacks"
        )
    return True


def _plan(args: argparse.Namespace, on_cpu: bool) -> Sequence[AnyCase]:
    from jaxwna16.bench.cases import plan_cases
    from jaxwna16.bench.moe_cases import plan_moe_cases
    from jaxwna16.bench.tune import TOKENS as TUNED_TOKENS

    if args.step is not None:
        return _plan_step(args, on_cpu)
    plan: Callable[..., Sequence[AnyCase]]
    if args.moe is None:
        plan, named = plan_cases, args.shapes
        usual = parse_shapes(_CPU_SHAPES) if on_cpu else list_default_shapes()
    else:
        plan, named = plan_moe_cases, args.moe
        usual = parse_moe_shapes(_CPU_EXPERTS) if on_cpu else list(MOE_MODELS.values())
    shapes: Any = named or usual
    tokens = args.tokens or (_CPU_TOKENS if on_cpu else TUNED_TOKENS if args.tune else TOKENS)
    kinds = [kind for kind, wanted in ((False, args.asymmetric), (True, args.symmetric)) if wanted]
    facts: dict[str, Any] = {
        "group_size": args.group_size,
        "dtype": args.dtype,
        "bits": args.bits or [4],
        "symmetric": kinds or [False],
    }
    cases = plan(shapes, tokens, **facts)
    if named or args.bits or kinds or on_cpu:
        return cases
    # the targets also compare with 8 bits and with a symmetric twin
    extra: list[dict[str, Any]] = [{"bits": [8]}]
    if not args.tune:  # tiles do not depend on symmetry
        extra.append({"symmetric": [True]})
    few = [m for m in tokens if m in (1, 16, 64)]
    others = [c for kind in extra for c in plan(shapes[:1], few, **(facts | kind))]
    first = [c for c in cases if c.weight == cases[0].weight]
    return [*first, *others, *cases[len(first) :]]


def _plan_step(args: argparse.Namespace, on_cpu: bool) -> Sequence[Any]:
    from jaxwna16.bench.step_cases import plan_step_cases

    models = args.step or ([TINY_STEP] if on_cpu else list(STEP_MODELS.values()))
    rows = args.tokens or _STEP_ROWS[on_cpu]
    return plan_step_cases(models, rows, args.slots or _STEP_SLOTS[on_cpu], args.dtype)


def _bench(
    args: argparse.Namespace, cases: Sequence[AnyCase], on_cpu: bool, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The parts of the report so far, after each weight and after each peer."""
    import dataclasses

    from jaxwna16.bench.limits import measure_limits
    from jaxwna16.bench.peers import time_peers
    from jaxwna16.bench.run import Bench, Deadline, add_shares
    from jaxwna16.bench.step import time_step_cases, time_step_peers
    from jaxwna16.bench.timing import ON_CPU, ON_GPU

    effort = ON_CPU if on_cpu else ON_GPU
    deadline: Deadline = Deadline(args.seconds or _SECONDS)
    say("measuring this device's limits")
    limits = measure_limits(args.dtype, effort)
    rows: list[Row] = []
    peers: list[dict[str, Any]] = []

    def describe() -> dict[str, Any]:
        add_shares(rows, limits)
        return {"limits": dataclasses.asdict(limits), "rows": rows, "peers": peers}

    backend = "xla" if on_cpu else None
    steps: Any = cases if args.step is not None else []
    timed = Bench(cases, backend, effort, deadline, say).run()
    if steps:
        timed = time_step_cases(steps, backend, effort, deadline, say)
    for found in timed:
        rows += found
        yield describe()
    if args.peers:
        last = Deadline(args.peer_seconds)
        fares = time_peers(cases, rows, effort, last, say)
        if steps:
            fares = time_step_peers(steps, rows, effort, last, say)
        for fared in fares:
            peers.append(fared)
            yield describe()


def _tune(
    args: argparse.Namespace, cases: Sequence[AnyCase], _: bool, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The parts of the report so far, after each case; its winner is then in the table."""
    from jaxwna16.bench.run import Deadline
    from jaxwna16.bench.tune import (
        Workbench,
        plan_tuning,
        read_tuned,
        tune_cases,
        write_winners,
    )
    from jaxwna16.bench.tune_ahead import tune_ahead
    from pallas_kernels.tiles.device import find_device
    from pallas_kernels.tiles.tables import user_table_path

    device, deadline = find_device(), Deadline(args.seconds or _TUNING_SECONDS)
    path, origin = args.table or user_table_path(device.kind), _describe_origin()
    # read first, so that an unusable table costs no time on the GPU
    table = read_tuned(path, device)
    entries, ahead = len(table.entries) + len(table.experts), table.ahead
    plan, tuned = plan_tuning(cases), []

    def describe() -> dict[str, Any]:
        left = len(plan) - len(tuned)
        return {
            "tuned": tuned,
            "table": dict(file=str(path), entries=entries, cases_without_time=left, ahead=ahead),
        }

    yield describe()
    for found in tune_cases(plan, device, deadline, Workbench(deadline), say):
        tuned.append(found.describe())
        entries = write_winners([found], device, path, origin)
        yield describe()
    if args.moe is None:
        ahead = tune_ahead(device, path, origin, deadline, say)
        yield describe()


def _describe_origin() -> dict[str, str]:
    """The versions, date and commit that a table of tiles records."""
    from jaxwna16.bench.machine import describe_machine

    machine = describe_machine()
    versions = {name: machine["versions"][name] for name in ("jaxwna16", "jax", "jaxlib")}
    return versions | {"date": machine["date"], "commit": machine["commit"] or "unknown"}


def _describe_options(args: argparse.Namespace) -> dict[str, Any]:
    left_out = {"verb", "json"}
    options = {name: value for name, value in vars(args).items() if name not in left_out}
    for name in ("shapes", "moe", "step"):
        options[name] = options[name] and [shape.label for shape in options[name]]
    return {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}


@contextmanager
def _show_progress() -> Iterator[Callable[[str], None]]:
    """A status line on stderr, on a terminal only."""
    from jaxwna16.cli.screen import make_console

    with make_console(stderr=True).status("starting") as status:
        yield status.update
