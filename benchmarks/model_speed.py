"""Tokens per second of whole models with random weights, and their share of the memory's limit.

    python benchmarks/model_speed.py [--batches 1,16,64] [--models NAME,...] [--rounds 3]
                                     [--output FOLDER] [--trace] [--graph-loop] [--small]

Shapes: Qwen3-30B-A3B (128 experts) and Llama-3.1-8B (dense), W4A16 asymmetric, groups of 128, in
bfloat16; weights are drawn on the device. Each is measured as a user calls it, `generate_tokens`:
batches of 1, 16 and 64 prompts of 128 tokens that get 128 more, and the prefill of 2048 tokens.
A first call compiles; of the rounds after it the median counts.

The limit of a decode step is the time in which the memory, at the rate of a large copy measured in
this run, delivers what the step must read: all linear weights with scales and zero points, the
head, keys and values of the tokens so far, and of the experts as many different ones as B tokens
touch on average if they choose at random, E (1 - (1 - top_k / E)^B). It is no promise of what can
be had: nothing but reading counts.

Writes models.json and models.md after every case. `--trace` records a few decode steps of the first
case of each shape with JAX's profiler, in the programs that were measured, as MODEL.trace.json.gz
(for perfetto.dev), and prints the kernels that took longest. `--small` is a tiny shape, to try the
script without a GPU.

`--graph-loop` records the loop over tokens in the command buffer, too (a CUDA graph), so that the
host does not look after every token whether there is another one. XLA does not do so by itself, and
it was reported to crash when such a program runs a second time: try it in a process of its own. The
same for a program of yours:

    XLA_FLAGS="--xla_gpu_enable_command_buffer=+WHILE --xla_gpu_graph_min_graph_size=1"
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gzip
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.large_checkpoints import GROUP, SHAPES, Shape  # noqa: E402
from jaxwna16.bench.limits import measure_limits  # noqa: E402
from jaxwna16.bench.machine import describe_machine  # noqa: E402
from jaxwna16.bench.models import draw_weights  # noqa: E402
from jaxwna16.bench.shapes import parse_counts  # noqa: E402
from jaxwna16.bench.timing import ON_CPU, ON_GPU  # noqa: E402
from jaxwna16.generation.tokens import GenerationResult, generate_tokens  # noqa: E402
from jaxwna16.models.causal_lm import CausalLM  # noqa: E402
from jaxwna16.models.families import find_family  # noqa: E402
from pallas_kernels.format.spec import QuantSpec  # noqa: E402

MODELS = {
    "Qwen3-30B-A3B": dataclasses.replace(
        SHAPES["Qwen3-30B-A3B, 4 layers"], layers=48, vocabulary=151936, tied=False
    ),
    "Llama-3.1-8B": SHAPES["Llama 8B"],
}
SMALL = {
    name: dataclasses.replace(
        shape, hidden=256, inner=128, layers=2, heads=2, kv_heads=1, vocabulary=512, experts=experts
    )
    for (name, shape), experts in zip(MODELS.items(), (16, 0), strict=True)
}


@dataclasses.dataclass(frozen=True)
class Case:
    """How many prompts of how many tokens, and how many tokens each of them gets."""

    batch: int
    prompt: int
    new: int

    @property
    def name(self) -> str:
        return f"batch {self.batch}" if self.new > 1 else f"prefill {self.prompt}"


GRAPH_LOOP = "--xla_gpu_enable_command_buffer=+WHILE --xla_gpu_graph_min_graph_size=1"
"""The body of the loop is recorded anyway; a graph of one loop is small."""

BATCHES = (1, 16, 64)
PREFILL = Case(1, 2048, 1)
SMALL_PREFILL = Case(1, 40, 1)
TRACED_TOKENS = 9
"""So many tokens of a row are in a profile, the first of them of the prefill."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every shape, write and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=parse_counts, default=BATCHES, metavar="B,...")
    parser.add_argument("--models", type=lambda text: text.split(","), metavar="NAME,...")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None, metavar="FOLDER")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--graph-loop", action="store_true", help="record the loop over tokens")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    shapes, length, prefill = (
        (SMALL, 16, SMALL_PREFILL) if options.small else (MODELS, 128, PREFILL)
    )
    names = options.models or list(shapes)
    if unknown := [name for name in names if name not in shapes]:
        parser.error(f"no model {unknown[0]!r}: there are {', '.join(shapes)}")
    if options.graph_loop:
        # XLA reads it when the first device is asked for
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {GRAPH_LOOP}".strip()
    folder = options.output or Path(os.environ.get("OUT") or ROOT / "benchmarks/results/gpu")
    folder.mkdir(parents=True, exist_ok=True)
    effort = ON_GPU if jax.devices()[0].platform == "gpu" else ON_CPU
    limits = measure_limits("bfloat16", effort)
    cases = [*(Case(batch, length, length) for batch in options.batches), prefill]
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "limits": dataclasses.asdict(limits),
        "graph_loop": options.graph_loop,
        "models": {},
    }
    for name in names:
        shape = shapes[name]
        model = make_model(shape)
        rows = report["models"][name] = {}
        for case in cases:
            rows[case.name] = measure(model, shape, case, options.rounds, limits.bytes_per_second)
            # after every figure: whoever is stopped has those before
            write(folder, report)
            print(f"{name}, {case.name}: {json.dumps(rows[case.name])}", flush=True)
            if options.trace and case is cases[0]:
                trace(model, case, folder / f"{name}.trace.json.gz")
        del model
    print(tabulate(report))


def trace(model: CausalLM, case: Case, path: Path) -> None:
    """Record a few decode steps of a case that was measured; a failure costs nothing but itself."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                run(model, case, TRACED_TOKENS)
            [found] = Path(folder).rglob("*.trace.json.gz")
            shutil.copyfile(found, path)
        print_kernels(path)
    except Exception as error:
        print(f"no profile: {type(error).__name__}: {error}", flush=True)


def print_kernels(path: Path, most: int = 25) -> None:
    """What took longest on the device, by name, from a profile."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    named = [event for event in events if event.get("ph") == "M"]
    processes = {e["pid"]: e["args"]["name"] for e in named if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in named if e["name"] == "thread_name"}

    def is_kernel(event: dict[str, Any]) -> bool:
        # beside its streams a GPU has lines that sum up what is on them
        thread = threads.get((event["pid"], event["tid"]), "")
        return "/device:" in processes.get(event["pid"], "") and thread.startswith("Stream")

    seconds: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and is_kernel(event):
            seconds[event["name"]] += event["dur"] / 1e6
            counts[event["name"]] += 1
    print(f"{path.name}: {seconds.total() * 1e3:.2f} ms of {counts.total()} kernels")
    for name, total in seconds.most_common(most):
        print(f"{total * 1e3:9.3f} ms {counts[name]:6d} x {name}", flush=True)


def make_model(shape: Shape) -> CausalLM:
    """The model, its weights drawn on the default device."""
    config = shape.describe(symmetric=False)
    family = find_family(config)
    parsed, specs = family.read(config), list_specs(shape)
    model = nnx.eval_shape(lambda: family.open_class()(parsed, specs, dtype="bfloat16"))
    return draw_weights(model)


def list_specs(shape: Shape) -> dict[str, QuantSpec]:
    """Module -> spec, with the experts of a layer as stacks."""
    specs = {}
    for layer in shape.list_layers():
        for path, n, k in shape.list_linears(layer):
            if ".experts." not in path:
                specs[path] = make_spec(n, k)
        if shape.experts:
            specs[f"{layer}.mlp.experts.w13"] = make_spec(2 * shape.inner, shape.hidden)
            specs[f"{layer}.mlp.experts.w2"] = make_spec(shape.hidden, shape.inner)
    return specs


def make_spec(n: int, k: int) -> QuantSpec:
    return QuantSpec(bits=4, group_size=GROUP, symmetric=False, in_features=k, out_features=n)


def run(model: CausalLM, case: Case, most: int | None = None) -> GenerationResult:
    """One call of what a user calls, with random prompts; it may end early, after `most` tokens.

    A smaller `max_new_tokens` would be another program.
    """
    numbers = np.random.default_rng(0)
    prompts = numbers.integers(0, model.config.vocab_size, (case.batch, case.prompt)).tolist()
    made = 0

    def stop(new: list[list[int]]) -> dict[int, int]:
        nonlocal made
        made += len(new[0])
        return dict.fromkeys(range(case.batch), most) if most and made >= most else {}

    return generate_tokens(
        model, prompts, max_new_tokens=case.new, stream=None if most is None else stop
    )


def measure(
    model: CausalLM, shape: Shape, case: Case, rounds: int, bytes_per_second: float
) -> dict[str, Any]:
    """Speeds of a case, and what share of the limit its decode steps reach."""
    first = run(model, case)
    results = [run(model, case) for _ in range(rounds)]
    row: dict[str, Any] = {
        "batch": case.batch,
        "prompt_tokens": case.prompt,
        "new_tokens": case.new,
        "compile_seconds": first.compile_seconds,
        "prefill_tokens_per_second": [r.prefill_tokens_per_second for r in results],
    }
    if case.new > 1:
        step = statistics.median(r.decode_seconds for r in results) / (case.new - 1)
        limit = count_step_bytes(model, shape, case) / bytes_per_second
        row |= {
            "decode_tokens_per_second": [r.decode_tokens_per_second for r in results],
            "step_seconds": step,
            "limit_seconds": limit,
            "share_of_limit": limit / step,
        }
    return row


def count_step_bytes(model: CausalLM, shape: Shape, case: Case) -> float:
    """What a decode step must read, half way through the new tokens."""
    touched = 1.0
    if shape.experts:
        touched = 1 - (1 - shape.top_k / shape.experts) ** case.batch
    total = 0.0
    for path, variable in nnx.to_flat_state(nnx.split(model)[1]):
        leaf = variable.get_value()
        looked_up = "embed_tokens" in path and not shape.tied
        share = case.batch / leaf.shape[0] if looked_up else touched if "experts" in path else 1.0
        total += share * leaf.size * leaf.dtype.itemsize
    slots = case.prompt + case.new // 2
    # keys and values of bfloat16, heads of 128
    return total + case.batch * slots * shape.layers * 2 * shape.kv_heads * 128 * 2


def write(folder: Path, report: dict[str, Any]) -> None:
    """models.json and models.md, each made beside its place and renamed."""
    for name, text in (("json", json.dumps(report, indent=2)), ("md", tabulate(report))):
        draft = folder / f".models.{name}"
        draft.write_text(f"{text}\n", "utf-8")
        draft.replace(folder / f"models.{name}")


def tabulate(report: dict[str, Any]) -> str:
    """A Markdown table with the run it comes from."""
    machine = report["machine"]
    origin = (
        f"{machine['device']['kind']}, {report['limits']['bytes_per_second'] / 1e9:.0f} GB/s by "
        f"{report['limits']['method']}, jax {machine['versions']['jax']}, commit "
        f"{str(machine['commit'])[:10]}, {machine['date']}"
        + (", the loop over tokens in the command buffer" if report["graph_loop"] else "")
    )
    return "\n".join([*_list_lines(report["models"]), "", origin])


def _list_lines(models: dict[str, Any]) -> Iterator[str]:
    yield "| model | case | prefill tokens/s | decode tokens/s | ms a step | share of the limit |"
    yield "|---|---|---:|---:|---:|---:|"
    for name, rows in models.items():
        for case, row in rows.items():
            cells = [f"{statistics.median(row['prefill_tokens_per_second']):.0f}", "", "", ""]
            if "step_seconds" in row:
                cells[1] = f"{statistics.median(row['decode_tokens_per_second']):.1f}"
                cells[2] = f"{1e3 * row['step_seconds']:.2f}"
                cells[3] = f"{row['share_of_limit']:.0%}"
            yield f"| {name} | {case} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
