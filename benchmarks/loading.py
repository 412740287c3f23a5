"""Seconds, GB/s and peak host memory of loading a packed checkpoint, against transformers.

    python benchmarks/loading.py [--rounds 3]

Also of its converted copy, which is compared with plain reading of the copy's bytes, done next: a
megabyte at a time into one buffer, which never leaves the processor's caches, and into new memory.

Checkpoints: SmolLM2-135M (W4A16, groups of 32) and a Llama shape of 2 GB with random words (hidden
4096, W4A16, groups of 128, shards of 1 GB). Each load is a fresh process. Before each, another
process reads the files, so the page cache is warm, and right before it the process itself touches
as much memory as the load may take, in huge pages, and gives it back: on a virtual machine, memory
that was not used lately comes ten times slower. Peak memory is the process's maximum resident size
minus what it had after its imports. transformers maps the files (its load ends with a look at every
page of every tensor) and decompresses the model when it is first used (its second figure: load and
one token). It loads the symmetric checkpoints only, asymmetric dense ones fail in 5.23.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
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
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, GROUP = 4096, 14336, 18, 1024, 128
SHARD_LAYERS = 9
# how many times the packed weights a loader takes: bfloat16 ones are four times as large
TAKEN = {"jaxwna16": 2, "transformers": 5, "plain read": 0, "read and kept": 2, "warm-up": 0}


def main() -> None:
    """Prepare the checkpoints, load each one with each loader, write and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("LOADER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        loader, folder = options.measure
        return print(json.dumps(measure(loader, Path(folder))))

    from benchmarks.machine import write_result

    runs: dict[str, Any] = {}
    for name, folder, symmetric in prepare():
        loaders = [n for n in LOADERS if n != "warm-up" and (symmetric or n[:5] != "trans")]
        samples: dict[str, Any] = {loader: [] for loader in loaders}
        for _ in range(options.rounds):
            for loader in loaders:
                read = name_copy(folder) if loader.endswith(", converted") else folder
                run("warm-up", read)
                samples[loader].append(run(loader, read))
        runs[name] = summarize(folder, samples)
        print_row(name, runs[name])
    print(write_result("loading", {"checkpoints": runs}))


def summarize(folder: Path, samples: dict[str, Any]) -> dict[str, Any]:
    """Medians, what jaxwna16 promises to keep to, and how near it comes to plain reading."""
    from loaders.converted import open_plan
    from loaders.plan import make_plan
    from loaders.safetensors_file import TensorInfo

    plan = make_plan(folder)
    tensors = [
        info.nbytes
        for part in plan.list_parts()
        for info in ([part] if isinstance(part, TensorInfo) else part.tensors.values())
    ]
    result: dict[str, Any] = {
        "bytes": plan.nbytes,
        "converted_bytes": open_plan(name_copy(folder)).nbytes,
        "largest_tensor_bytes": max(tensors),
        "memory_bound_bytes": plan.nbytes + 2 * max(tensors) + 500_000_000,
        "loaders": {},
    }
    for loader, values in samples.items():
        seconds = statistics.median(v["seconds"] for v in values)
        key = "converted_bytes" if loader.endswith(", converted") else "bytes"
        result["loaders"][loader] = {
            "seconds": seconds,
            "gigabytes_per_second": result[key] / seconds / 1e9,
            "peak_bytes": statistics.median(v["peak_bytes"] for v in values),
            "samples": values,
        }
    for reading in ("plain read", "read and kept"):
        pairs = zip(samples["jaxwna16, converted"], samples[f"{reading}, converted"], strict=True)
        shares = [plain["seconds"] / ours["seconds"] for ours, plain in pairs]
        result[f"converted_share_of_{reading.replace(' ', '_')}"] = statistics.median(shares)
    return result


def print_row(name: str, result: dict[str, Any]) -> None:
    """One checkpoint's figures."""
    bound = result["memory_bound_bytes"] / 1e6
    print(f"{name}: {result['bytes'] / 1e6:.0f} MB, memory bound {bound:.0f} MB")
    for loader, row in result["loaders"].items():
        print(
            f"  {loader:24} {row['seconds']:7.2f} s {row['gigabytes_per_second']:6.2f} GB/s "
            f"peak {row['peak_bytes'] / 1e6:7.0f} MB"
        )
    print(
        f"  the converted copy loads at {result['converted_share_of_plain_read']:.0%} of plain "
        f"reading, at {result['converted_share_of_read_and_kept']:.0%} of reading into new memory"
    )


def run(loader: str, folder: Path) -> dict[str, float]:
    """One load in a fresh process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--measure", loader, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{loader} on {folder}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(loader: str, folder: Path) -> dict[str, float]:
    """In the fresh process: import and start up first, then load and hold the result."""
    load = LOADERS[loader]()
    taken = TAKEN[loader.partition(",")[0]]
    touch_memory(taken * sum(p.stat().st_size for p in folder.glob("*.safetensors")))
    before = peak_bytes()
    begin = time.perf_counter()
    held = load(folder)
    seconds = time.perf_counter() - begin
    del held
    return {"seconds": seconds, "peak_bytes": peak_bytes() - before}


def peak_bytes() -> int:
    """Maximum resident size of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("peak memory needs Linux's /proc")


def touch_memory(size: int) -> None:
    """Make the machine give memory, and take it back; the peak of this process begins anew."""
    held = mmap.mmap(-1, size + 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.madvise(mmap.MADV_HUGEPAGE)
    for page in range(0, size, mmap.PAGESIZE):
        held[page] = 1
    held.close()
    Path("/proc/self/clear_refs").write_text("5")


def start_ours() -> Any:
    """jaxwna16, with the backend started."""
    import jax

    from jaxwna16 import load_checkpoint

    jax.block_until_ready(jax.numpy.zeros(1))
    return functools.partial(load_checkpoint, progress=False)


def start_transformers(first_use: bool = False) -> Any:
    """transformers with compressed-tensors; it decompresses the whole model when first used."""
    import compressed_tensors  # noqa: F401 (imported before memory is counted)
    import torch
    import transformers

    def load(folder: Path) -> Any:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
        if first_use:
            with torch.inference_mode():
                model(torch.zeros((1, 1), dtype=torch.long))
        else:
            for tensor in model.state_dict().values():
                tensor.detach().reshape(-1).view(torch.uint8)[::4096].sum()
        return model

    return load


def start_read() -> Any:
    """The bytes alone, a megabyte at a time."""

    def read(folder: Path) -> None:
        chunk = bytearray(1 << 20)
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(chunk):
                    pass

    return read


def start_keep() -> Any:
    """The bytes alone, into memory of their own."""
    import numpy as np

    return lambda folder: [
        np.fromfile(path, np.uint8) for path in sorted(folder.glob("*.safetensors"))
    ]


def start_warm_up() -> Any:
    """Not a loader: reads the files, for the loader that runs next."""
    return start_read()


LOADERS = {
    "warm-up": start_warm_up,
    "jaxwna16": start_ours,
    "transformers, mapped": start_transformers,
    "transformers, first use": functools.partial(start_transformers, first_use=True),
    "plain read": start_read,
    "jaxwna16, converted": start_ours,
    "plain read, converted": start_read,
    "read and kept, converted": start_keep,
}


def name_copy(folder: Path) -> Path:
    """Where the converted copy of a checkpoint is."""
    return folder.with_name(f"{folder.name}-converted")


def prepare() -> list[tuple[str, Path, bool]]:
    """Name, folder and symmetry of every checkpoint, made once."""
    import jaxwna16
    from examples.fetch_smollm2 import fetch

    made = []
    for symmetric in (True, False):
        sign = "symmetric" if symmetric else "asymmetric"
        small, large = FOLDER / f"smollm2-{sign}", FOLDER / f"llama-2GB-{sign}"
        if not small.exists():
            jaxwna16.quantize_checkpoint(fetch(), small, group_size=32, symmetric=symmetric)
        if not large.exists():
            write_large(large, symmetric)
        for folder in (small, large):
            if not name_copy(folder).exists():
                jaxwna16.convert_checkpoint(folder, name_copy(folder))
        made += [(f"SmolLM2 {sign}", small, symmetric), (f"Llama 2 GB {sign}", large, symmetric)]
    return made


def write_large(folder: Path, symmetric: bool) -> None:
    """Write the Llama shape with random words, shard by shard."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from jaxwna16.rewrite import describe_quantization
    from loaders.write import build_folder

    numbers = np.random.default_rng(0)
    shapes = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN)}
    shapes = {f"mlp.{name}": shape for name, shape in shapes.items()}
    shapes["mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
    shapes |= {f"self_attn.{x}_proj": (HIDDEN if x in "qo" else 1024, HIDDEN) for x in "qkvo"}

    def make_words(*shape: int) -> Any:
        return numbers.integers(-(2**31), 2**31, shape, np.int32)

    def make_module(path: str, n: int, k: int) -> dict[str, Any]:
        scale = numbers.uniform(0.001, 0.01, (n, k // GROUP)).astype(ml_dtypes.bfloat16)
        module = {
            f"{path}.weight_packed": make_words(n, k // 8),
            f"{path}.weight_scale": scale,
            f"{path}.weight_shape": np.array([n, k]),
        }
        if not symmetric:
            module[f"{path}.weight_zero_point"] = make_words(n // 8, k // GROUP)
        return module

    with build_folder(folder) as partial:
        weight_map = {}
        for first in range(0, LAYERS, SHARD_LAYERS):
            name, tensors = f"model-{first:05}.safetensors", {}
            for layer in range(first, first + SHARD_LAYERS):
                path = f"model.layers.{layer}"
                for part, (n, k) in shapes.items():
                    tensors |= make_module(f"{path}.{part}", n, k)
                for norm in ("input_layernorm", "post_attention_layernorm"):
                    tensors[f"{path}.{norm}.weight"] = np.ones(HIDDEN, ml_dtypes.bfloat16)
            if first == 0:
                embedding = numbers.standard_normal((VOCABULARY, HIDDEN), np.float32)
                tensors["model.embed_tokens.weight"] = embedding.astype(ml_dtypes.bfloat16)
                tensors["model.norm.weight"] = np.ones(HIDDEN, ml_dtypes.bfloat16)
            save_file(tensors, partial / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
        index = {"metadata": {}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index))
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
            "quantization_config": describe_quantization(4, GROUP, symmetric, ["lm_head"]),
        }
        (partial / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
