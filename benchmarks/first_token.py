"""Seconds to the first token and to the last in a new process: what compiling takes of them.

    python benchmarks/first_token.py [--rounds 3]

SmolLM2 in 4 bits (asymmetric, groups of 32), a chat prompt of 37 tokens, 32 new ones, greedy,
float32 activations. Each run is a process of its own; the ways of compiling take turns:

- one after the other: prefill and decode loop, and the first token is given out when
  all are compiled (as it was up to 0.1.0);
- at the same time: as `generate` does it;
- kept: with `keep_programs`, in a folder where an earlier process has left them.

All must give the same tokens. Writes benchmarks/results/first_token.json and the table in
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

FOLDER = ROOT / ".cache" / "benchmarks" / "packed"
PROMPT, NEW_TOKENS = "What is the capital of France?", 32
WAYS = ("one after the other", "at the same time", "kept")
COLUMNS = {
    "first_token_seconds": "to the first token, s",
    "last_token_seconds": "to the last token, s",
    "compile_seconds": "compiling, s",
    "processor_seconds": "processor time, s",
    "peak_bytes": "peak memory, MB",
}


def main() -> None:
    """Prepare the checkpoint, run each way in turn, write and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return print(json.dumps(run(options.run)))

    from benchmarks.machine import write_result
    from benchmarks.plot import fill

    prepare()
    samples: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as programs:
        start("kept", programs)  # leaves its programs there
        for _ in range(options.rounds):
            for way in WAYS:
                samples[way].append(start(way, programs))
                print(way, samples[way][-1], flush=True)
    tokens = [sample.pop("tokens") for way in WAYS for sample in samples[way]]
    if any(found != tokens[0] for found in tokens):
        raise SystemExit("the ways of compiling gave different tokens")
    result = {
        "prompt_tokens": samples[WAYS[0]][0]["prompt_tokens"],
        "new_tokens": NEW_TOKENS,
        "samples": samples,
    }
    path = write_result("first_token", result)
    table = tabulate(json.loads(path.read_text()))
    fill("first_token", table)
    print(path, table, sep="\n")


def prepare() -> None:
    """Make the packed checkpoint, once."""
    import jaxwna16
    from examples.fetch_smollm2 import fetch

    if not FOLDER.exists():
        jaxwna16.quantize_checkpoint(fetch(), FOLDER, group_size=32, symmetric=False)


def start(way: str, programs: str) -> dict[str, Any]:
    """Run one way in a process of its own."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = str(way == "kept").lower()
    environment["JAX_COMPILATION_CACHE_DIR"] = programs
    command = [sys.executable, __file__, "--run", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    return json.loads(done.stdout)


def run(way: str) -> dict[str, Any]:
    """One way in this process: load, then time one call from the prompt on."""
    import jaxwna16
    from jaxwna16.generation import tokens as generation

    if way == "one after the other":
        generation.Compilation = OneAfterTheOther
    if way == "kept":
        jaxwna16.keep_programs()
    model = jaxwna16.load_model(FOLDER, dtype="float32", progress=False)
    tokenizer = jaxwna16.Tokenizer.from_folder(FOLDER)
    times: list[float] = []
    began, processor = time.perf_counter(), time.process_time()
    result = jaxwna16.generate(
        model,
        PROMPT,
        tokenizer=tokenizer,
        chat=True,
        max_new_tokens=NEW_TOKENS,
        stream=lambda texts: times.append(time.perf_counter() - began),
    ).result
    return {
        "first_token_seconds": times[0],
        "last_token_seconds": time.perf_counter() - began,
        "compile_seconds": result.compile_seconds,
        "processor_seconds": time.process_time() - processor,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "prompt_tokens": result.prompt_tokens,
        "tokens": result.tokens,
    }


class OneAfterTheOther:
    """Instead of `jaxwna16.programs.Compilation`: compiles what is started before it goes on."""

    def start(self, name: str, program: Any) -> None:
        """Compile it."""
        program.compile()

    def wait(self, *names: str) -> None:
        """Nothing is left to wait for."""


def tabulate(result: dict[str, Any]) -> str:
    """Medians as a Markdown table, with the run they come from."""
    from benchmarks.plot import tell_origin

    lines = [f"| programs | {' | '.join(COLUMNS.values())} |", "|---|" + "---:|" * len(COLUMNS)]
    for way, samples in result["samples"].items():
        middle = {name: statistics.median(sample[name] for sample in samples) for name in COLUMNS}
        cells = [f"{x / 1e6:.0f}" if n == "peak_bytes" else f"{x:.1f}" for n, x in middle.items()]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", tell_origin(result["machine"])])


if __name__ == "__main__":
    main()
