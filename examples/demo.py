"""The main job on a real model: quantize SmolLM2-135M-Instruct, load it, ask it, measure it.

Run by `make demo`. The model is fetched once into `.cache/` (see fetch_smollm2.py); the two
quantized versions are made anew each time, so what is measured is what this code wrote.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from fetch_smollm2 import fetch
from rich import box
from rich.console import Console
from rich.table import Table

import jaxwna16
from jaxwna16.cli.main import main as run_command
from jaxwna16.evaluation.perplexity import read_text
from jaxwna16.generation.tokens import generate_tokens

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "examples" / "data" / "persuasion.txt"
QUESTION = "What is the capital of France?"
WINDOW, WINDOWS = 512, 16
PROMPT_TOKENS, NEW_TOKENS = 256, 64

console = Console()


def main() -> None:
    """Make the three versions, show one at work, and print the table."""
    started = time.perf_counter()
    source = fetch()
    symmetric = quantize(source, "W4A16-sym-g32", symmetric=True)
    asymmetric = quantize(source, "W4A16-asym-g32", symmetric=False)
    say(f"jaxwna16 inspect {asymmetric.relative_to(ROOT)}")
    run_command(["inspect", str(asymmetric)])

    rows = [
        measure("float32", source),
        measure("W4 symmetric g32", symmetric),
        measure("W4 asymmetric g32", asymmetric),
    ]
    console.print()
    console.print(make_table(rows))
    console.print(
        f"Perplexity: {WINDOWS} windows of {WINDOW} tokens from the middle of Persuasion, "
        f"computed in float32. Speed in tokens per second, median of 3: {PROMPT_TOKENS} prompt "
        f"tokens, {NEW_TOKENS} new ones, batch 1, on this machine's CPU. "
        f"Everything took {time.perf_counter() - started:.0f} s."
    )


def quantize(source: Path, name: str, *, symmetric: bool) -> Path:
    """Write a 4-bit version of the model, groups of 32, rounding to nearest."""
    destination = ROOT / ".cache" / "demo" / name
    shutil.rmtree(destination, ignore_errors=True)
    sign = "--symmetric" if symmetric else "--asymmetric"
    say(
        f"jaxwna16 quantize {source.relative_to(ROOT)} {destination.relative_to(ROOT)} "
        f"--bits 4 --group-size 32 {sign}"
    )
    jaxwna16.quantize_checkpoint(source, destination, bits=4, group_size=32, symmetric=symmetric)
    return destination


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Load a version, let it answer, and measure size, speed and perplexity."""
    say(f'model = jaxwna16.load_model("{folder.relative_to(ROOT)}", dtype="float32")')
    start = time.perf_counter()
    model = jaxwna16.load_model(folder, dtype="float32")
    load_seconds = time.perf_counter() - start
    tokenizer = jaxwna16.Tokenizer.from_folder(folder)

    console.print(f"[bold]Q[/bold] {QUESTION}\n[bold]A[/bold] ", end="")
    show = lambda new: print(new[0], end="", flush=True)  # noqa: E731
    jaxwna16.generate(model, QUESTION, chat=True, max_new_tokens=48, stream=show)
    print()

    text = read_text(TEXT)
    tokens = tokenizer.encode(text[len(text) // 2 :])
    quality = jaxwna16.measure_perplexity(model, tokens, window=WINDOW, max_windows=WINDOWS)
    prompt = [tokens[:PROMPT_TOKENS]]
    generate_tokens(model, prompt, max_new_tokens=NEW_TOKENS)  # compiles
    runs = [generate_tokens(model, prompt, max_new_tokens=NEW_TOKENS) for _ in range(3)]
    return {
        "name": name,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "load_seconds": load_seconds,
        "perplexity": quality.perplexity,
        "prefill": statistics.median(run.prefill_tokens_per_second for run in runs),
        "decode": statistics.median(run.decode_tokens_per_second for run in runs),
    }


def make_table(rows: list[dict[str, Any]]) -> Table:
    """The figures of all versions side by side."""
    table = Table(title="SmolLM2-135M-Instruct", box=box.SIMPLE_HEAD)
    columns = ("version", "MB", "load s", "perplexity", "prefill/s", "decode/s")
    for column in columns:
        justify = "left" if column == "version" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['load_seconds']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['prefill']:.0f}",
            f"{row['decode']:.1f}",
        )
    return table


def say(command: str) -> None:
    """Show what is being run."""
    console.print(f"\n[dim]$ {command}[/dim]", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
