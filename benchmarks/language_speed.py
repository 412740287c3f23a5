"""Prefill and decode tokens per second of SmolLM2: jaxwna16 against transformers in float32.

    python benchmarks/language_speed.py [--rounds 7]

Three engines, one process each, so that no thread pool disturbs another: jaxwna16 on the packed
W4A16 checkpoint (asymmetric, groups of 32), jaxwna16 on the float32 one, and transformers in
float32 on the decompressed weights of the packed one. They take turns, round by round; only one
computes at a time. Before anything is timed, all must give the same greedy tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

FOLDER = ROOT / ".cache" / "benchmarks"
PROMPT_TOKENS, NEW_TOKENS, BATCHES = 256, 64, (1, 4)


def main() -> None:
    """Prepare the checkpoints, drive the engines, write and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)

    from benchmarks.machine import write_result

    prepare()
    workers = {name: start(name) for name in ENGINES}
    try:
        tokens = {name: ask(worker, 1)["tokens"] for name, worker in workers.items()}
        if any(found != tokens["transformers float32"] for found in tokens.values()):
            raise SystemExit("the engines gave different greedy tokens")
        samples: dict[str, Any] = {}
        for batch in BATCHES:
            for worker in workers.values():
                ask(worker, batch)  # warm-up: compiles
            for _ in range(options.rounds):
                for name, worker in workers.items():
                    answer = ask(worker, batch)
                    for phase in ("prefill", "decode"):
                        key = f"{phase}, batch {batch}"
                        samples.setdefault(key, {}).setdefault(name, []).append(answer[phase])
    finally:
        for worker in workers.values():
            worker.kill()
    result = {
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "unit": "tokens per second",
        "samples": samples,
        "ratios_to_transformers": compare(samples),
    }
    print(write_result("language_speed", result))
    for key, engines in samples.items():
        for name, values in engines.items():
            ratio = result["ratios_to_transformers"][key].get(name)
            versus = f"  {ratio['median']:.2f}x transformers" if ratio else ""
            print(f"{key:18} {name:22} {statistics.median(values):8.1f} tokens/s{versus}")


def compare(samples: dict[str, Any]) -> dict[str, Any]:
    """Ratio of each engine to transformers, round by round: least, median, most."""
    ratios: dict[str, Any] = {}
    for key, engines in samples.items():
        base = engines["transformers float32"]
        ratios[key] = {
            name: summarize([a / b for a, b in zip(values, base, strict=True)])
            for name, values in engines.items()
            if values is not base
        }
    return ratios


def summarize(values: list[float]) -> dict[str, float]:
    """Least, median and most."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def prepare() -> None:
    """Make the packed checkpoint and its decompressed twin, once."""
    import jaxwna16
    from examples.fetch_smollm2 import fetch

    if not (FOLDER / "packed").exists():
        jaxwna16.quantize_checkpoint(fetch(), FOLDER / "packed", group_size=32, symmetric=False)
    if not (FOLDER / "decompressed").exists():
        jaxwna16.dequantize_checkpoint(FOLDER / "packed", FOLDER / "decompressed")


def start(name: str) -> subprocess.Popen:
    """Start one engine's process and wait until its model is loaded."""
    command = [sys.executable, __file__, "--serve", name]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    read(worker)
    return worker


def ask(worker: subprocess.Popen, batch: int) -> dict[str, Any]:
    """Let an engine run once."""
    assert worker.stdin is not None
    worker.stdin.write(f"{batch}\n")
    worker.stdin.flush()
    return read(worker)


def read(worker: subprocess.Popen) -> dict[str, Any]:
    """The next answer of an engine."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise SystemExit("an engine ended early: see its message above")
    return json.loads(line)


def serve(name: str) -> None:
    """The other side: load a model, then time one run for every line that comes in."""
    run = ENGINES[name]()
    print(json.dumps({"ready": name}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(make_prompts(int(line)))), flush=True)


def make_prompts(batch: int) -> list[list[int]]:
    """The first tokens of the second half of the shipped text."""
    import jaxwna16
    from jaxwna16.evaluation.perplexity import read_text

    text = read_text(ROOT / "examples" / "data" / "persuasion.txt")
    tokenizer = jaxwna16.Tokenizer.from_folder(FOLDER / "packed")
    tokens = tokenizer.encode(text[len(text) // 2 :][: 8 * PROMPT_TOKENS * batch])
    return [tokens[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(batch)]


def load_ours(folder: Path) -> Any:
    """jaxwna16 in float32."""
    import jaxwna16
    from jaxwna16.generation.tokens import generate_tokens

    model = jaxwna16.load_model(folder, dtype="float32", progress=False)

    def run(prompts: list[list[int]]) -> dict[str, Any]:
        result = generate_tokens(model, prompts, max_new_tokens=NEW_TOKENS)
        return {
            "tokens": result.tokens,
            "prefill": result.prefill_tokens_per_second,
            "decode": result.decode_tokens_per_second,
        }

    return run


def load_transformers() -> Any:
    """transformers in float32, all cores, its default attention."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    folder = FOLDER / "decompressed"
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = loaded.eval()

    def run(prompts: list[list[int]]) -> dict[str, Any]:
        ids = torch.tensor(prompts)
        seconds, tokens = {}, ids
        for new in (1, NEW_TOKENS):
            begin = time.perf_counter()
            with torch.inference_mode():
                tokens = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                    pad_token_id=0,
                )
            seconds[new] = time.perf_counter() - begin
        return {
            "tokens": tokens[:, ids.shape[1] :].tolist(),
            "prefill": ids.numel() / seconds[1],
            "decode": len(prompts) * (NEW_TOKENS - 1) / (seconds[NEW_TOKENS] - seconds[1]),
        }

    return run


ENGINES = {
    "jaxwna16 W4A16": lambda: load_ours(FOLDER / "packed"),
    "jaxwna16 float32": lambda: load_ours(FOLDER / "decompressed"),
    "transformers float32": load_transformers,
}


if __name__ == "__main__":
    main()
