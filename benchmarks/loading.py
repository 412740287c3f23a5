"""Seconds, GB/s and peak host memory of loading a packed checkpoint, against transformers.

    python benchmarks/loading.py [--rounds 3]

Also of its converted copy, which is compared with plain reading of the copy's bytes, done next: a
megabyte at a time into one buffer, which never leaves the processor's caches, and into new memory.

Checkpoints: SmolLM2-135M (W4A16, groups of 32), and with random words (W4A16, groups of 128) a
Llama shape of 2 GB, that of Llama-3.1-8B, and the first 4 layers of Qwen3-30B-A3B. Each load is a
fresh process. Before each, another process reads the files, so the page cache is warm, and right
before it the process itself touches as much memory as the load may take, in huge pages, and gives
it back: on a virtual machine, memory that was not used lately comes ten times slower. Peak memory
is the process's maximum resident size minus what it had after its imports. transformers maps the
files (its load ends with a look at every page of every tensor) and decompresses the model when it
is first used (its second figure: load and one token). It loads the symmetric checkpoints only,
asymmetric ones fail in 5.23; what takes more memory than the machine has is left out, and said.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

FOLDER = ROOT / ".cache" / "benchmarks"
CHECKPOINTS = [
    ("SmolLM2", True),
    ("SmolLM2", False),
    ("Llama 2 GB", True),
    ("Llama 8B", True),
    ("Qwen3-30B-A3B, 4 layers", True),
    ("Qwen3-30B-A3B, 4 layers", False),
]
# how many times the packed weights a loader takes: bfloat16 ones are four times as large
TAKEN = {
    "jaxwna16": 2,
    "transformers, mapped": 1,
    "transformers, first use": 4,
    "plain read": 0,
    "read and kept": 2,
    "warm-up": 0,
}


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
        loaders = choose_loaders(name, folder, symmetric)
        samples: dict[str, Any] = {loader: [] for loader in loaders}
        for _ in range(options.rounds):
            for loader in loaders:
                read = name_copy(folder) if loader.endswith(", converted") else folder
                run("warm-up", read)
                samples[loader].append(run(loader, read))
        runs[name] = summarize(folder, samples)
        print_row(name, runs[name])
    print(write_result("loading", {"checkpoints": runs}))


def choose_loaders(name: str, folder: Path, symmetric: bool) -> list[str]:
    """Those that can load a checkpoint here."""
    fitting = []
    for loader in LOADERS:
        transformers = loader.startswith("transformers")
        if loader == "warm-up" or (transformers and not symmetric):
            continue
        # it holds the words, which are mapped, until it has decompressed all
        needed = (1 + TAKEN[loader]) * count_bytes(folder) if transformers else 0
        if needed > read_memory("MemTotal"):
            print(f"{name}: {loader} is left out, it takes about {needed / 1e9:.0f} GB")
            continue
        fitting.append(loader)
    return fitting


def summarize(folder: Path, samples: dict[str, Any]) -> dict[str, Any]:
    """Medians, what jaxwna16 promises to keep to, and how near it comes to plain reading."""
    from loaders.files.safetensors_file import TensorInfo
    from loaders.open import open_plan
    from loaders.plan import make_plan

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
    touch_memory(TAKEN[loader.removesuffix(", converted")] * count_bytes(folder))
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


def read_memory(field: str) -> int:
    """A figure of /proc/meminfo, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def count_bytes(folder: Path) -> int:
    """Of a checkpoint's files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


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
    from benchmarks.large_checkpoints import SHAPES, write_checkpoint
    from examples.fetch_smollm2 import fetch

    made = []
    for name, symmetric in CHECKPOINTS:
        sign = "symmetric" if symmetric else "asymmetric"
        folder = FOLDER / re.sub(r"\W+", "-", f"{name} {sign}").lower()
        if not folder.exists() and name in SHAPES:
            write_checkpoint(folder, SHAPES[name], symmetric)
        elif not folder.exists():
            jaxwna16.quantize_checkpoint(fetch(), folder, group_size=32, symmetric=symmetric)
        if not name_copy(folder).exists():
            jaxwna16.convert_checkpoint(folder, name_copy(folder))
        made.append((f"{name}, {sign}", folder, symmetric))
    return made


if __name__ == "__main__":
    main()
