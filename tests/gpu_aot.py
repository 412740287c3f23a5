"""Compile a function for an NVIDIA GPU on a machine that has none, and read the machine code.

XLA's CUDA plugin compiles for a GPU that is only described (Pallas -> Triton -> PTX), and NVIDIA's
own assembler does the rest (PTX -> SASS). This shows what a kernel became: registers, spills,
shared memory, tensor core and copy instructions, what its main loop spends. It cannot show time or
numbers.

Beside jax it needs the plugin of jax's own version and three tools, all without their dependencies
(the plugin complains about a missing cuDNN unless JAX_PLATFORMS names a platform):

    pip install --no-deps jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION \
        nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvdisasm

In Python, where `specs` are `jax.ShapeDtypeStruct`s:

    for kernel in gpu_aot.compile(fn, *specs, arch="sm_90a"):
        print(kernel)

In a shell, from the root of the repository. LISTER takes no arguments and returns a dict, name of a
case -> (fn, specs):

    python -m tests.gpu_aot MODULE:LISTER [--arch sm_90a] [--json] [--sass FOLDER]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

# jax.sharding has no public name for this yet (0.10 to 0.12)
from jax._src.mesh import AbstractDevice
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, SingleDeviceSharding

# the plugin prints a stack trace at every compilation without a GPU; finding its names takes
# several times as long as compiling
os.environ.setdefault("LLVM_DISABLE_SYMBOLIZATION", "1")


@dataclasses.dataclass(frozen=True)
class Target:
    """Facts of one GPU model that the compiler asks for: bytes, and bytes per second."""

    device_kind: str
    major: int
    minor: int
    accelerated: bool
    cores: int
    l2: int
    memory: int
    bandwidth: int
    shared_per_core: int
    shared_per_block: int


# fmt: off
TARGETS = {
    "sm_80": Target("NVIDIA A100-SXM4-80GB", 8, 0, False, 108,
                    41943040, 85100068864, 2039040000000, 167936, 166912),
    "sm_89": Target("NVIDIA L4", 8, 9, False, 58,
                    50331648, 23580639232, 300096000000, 102400, 101376),
    "sm_90a": Target("NVIDIA H200", 9, 0, True, 132,
                     52428800, 151397597184, 4800000000000, 233472, 232448),
    "sm_100a": Target("NVIDIA B200", 10, 0, True, 148,
                      132644864, 191513755648, 8000000000000, 233472, 232448),
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one kernel became.

    Attributes:
      name: its entry point.
      registers: per thread.
      spill_bytes: per thread, written to local memory.
      shared_bytes: per block; `shared_limit` is what the target can give to one.
      tensor_columns: of tensor memory per block; a core of sm_100 has 512.
      opcodes: how often each instruction stands in the whole kernel.
      loop: the same for its longest loop.
      sass: the disassembly.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_columns: int
    opcodes: collections.Counter[str]
    loop: collections.Counter[str]
    sass: str = dataclasses.field(repr=False)

    def to_dict(self) -> dict:
        """Everything but the disassembly, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name != "sass"}

    def __str__(self) -> str:
        frequent = " ".join(f"{opcode}:{count}" for opcode, count in self.loop.most_common(12))
        return (
            f"{self.name}: {self.registers} registers, {self.spill_bytes} B spilled, "
            f"{self.shared_bytes} of {self.shared_limit} B shared, "
            f"{self.opcodes.total()} instructions, {self.loop.total()} in the longest loop\n"
            f"    {frequent}"
        )


def compile(fn: Callable, *specs: Any, arch: str = "sm_90a", only: str = "") -> list[Kernel]:
    """Compile `jax.jit(fn)` for `arch`, a key of `TARGETS`, and report each of its kernels.

    `specs` are trees of `jax.ShapeDtypeStruct`, the arguments of `fn`; kernels whose names lack
    the text `only` are left out.

    Raises:
      FileNotFoundError: if one of NVIDIA's tools is not installed.
      Exception: what the compiler raises.
    """
    with tempfile.TemporaryDirectory(prefix="gpu_aot_") as folder:
        dump(fn, *specs, arch=arch, folder=folder, emitters="triton-to-llvm|ptx")
        # XLA writes one file per kernel, and some that are empty or hold constants alone
        entry = re.compile(rf"\.entry\s+\w*{only}")
        sources = [p for p in sorted(Path(folder).glob("*.ptx")) if entry.search(p.read_text())]
        return [_assemble(ptx, arch) for ptx in sources]


def dump(fn: Callable, *specs: Any, arch: str, folder: str, emitters: str) -> None:
    """Compile `jax.jit(fn)` for `arch`, and leave what XLA writes of it in a folder.

    `emitters` is a regular expression of the stages whose results are wanted. Every argument stays
    one, used or not.
    """
    with aim(arch):
        traced = jax.jit(fn, keep_unused=True).trace(*place(specs, arch))
        options: dict[str, str | bool] = {
            "xla_dump_to": folder,
            "xla_dump_emitter_re": emitters,
        }
        traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=options)


def place(tree: Any, arch: str) -> Any:
    """The shapes of a tree, on the GPU that is not there."""
    here = SingleDeviceSharding(_describe_device(arch))
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), tree)


@contextlib.contextmanager
def aim(arch: str) -> Iterator[None]:
    """What is traced and lowered inside is for that GPU."""
    target = TARGETS[arch]
    # Since 0.11 Pallas-Triton asks the mesh which GPU it lowers for.
    abstract = AbstractDevice(target.device_kind, target.cores, "cuda")
    with jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=abstract)
    ):
        yield


@functools.cache
def _describe_device(arch: str):
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver and no cuDNN
    t = TARGETS[arch]
    feature = "ACCELERATED_FEATURES" if t.accelerated else "NONE"
    config = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {t.shared_per_core}
  shared_memory_per_block_optin: {t.shared_per_block}
  core_count: {t.cores} fpus_per_core: 128 clock_rate_ghz: 1.7
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {t.bandwidth} l2_cache_size: {t.l2} device_memory_size: {t.memory}
  cuda_compute_capability {{ major: {t.major} minor: {t.minor} feature_extension: {feature} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  name: "{t.device_kind}" device_vendor: "NVIDIA Corporation"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{t.device_kind}"
"""
    topology = topologies.get_topology_desc(
        arch, platform="cuda", target_config=config, topology="1x1x1"
    )
    return topology.devices[0]


def _assemble(ptx: Path, arch: str) -> Kernel:
    cubin = ptx.with_suffix(".cubin")
    log = _run_tool("ptxas", "-v", f"-arch={arch}", ptx, "-o", cubin)
    sass = _run_tool("nvdisasm", "-c", "-ndf", cubin)
    source = ptx.read_text()
    name = _find(r"\.entry\s+(\S+?)\s*\(", source)
    allocated = re.findall(r"tcgen05\.alloc\S*\s+\[[^\]]*\],\s*(\d+)", source)
    opcodes, loop = _read_opcodes(sass)
    return Kernel(
        name=name,
        registers=int(_find(r"Used (\d+) registers", log)),
        spill_bytes=int(_find(r"(\d+) bytes spill stores", log)),
        shared_bytes=_read_shared_bytes(ptx.parent, name, log),
        shared_limit=TARGETS[arch].shared_per_block,
        tensor_columns=sum(map(int, allocated)),
        opcodes=collections.Counter(opcodes),
        loop=collections.Counter(loop),
        sass=sass,
    )


def _read_shared_bytes(folder: Path, name: str, log: str) -> int:
    static = re.search(r"(\d+) bytes smem", log)
    if static:
        return int(static.group(1))
    # Triton asks for shared memory at launch, unseen by ptxas: its own dump says how much.
    dumps = [dump.read_text() for dump in folder.glob(f"*.{name}.triton-to-llvm*")]
    sizes = [size for dump in dumps for size in re.findall(r"ttg\.shared = (\d+)", dump)]
    return int(sizes[-1]) if sizes else 0


def _read_opcodes(sass: str) -> tuple[list[str], list[str]]:
    """All opcodes of a disassembly, and those of the longest region that a branch closes."""
    labels: dict[str, int] = {}
    body: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(body)
        elif text := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+\s+)?(.*?);?\s*$", line):
            body.append(text.group(1))
    opcodes = [text.split()[0] for text in body]
    loop: list[str] = []
    for end, text in enumerate(body):
        jump = re.match(r"BRA\S*\s.*?(\.L_x_\d+)", text)
        start = labels.get(jump.group(1), end) if jump else end
        # a branch to itself, or nearly, is padding at the end of the code
        if end - start > 8 and end + 1 - start > len(loop):
            loop = opcodes[start : end + 1]
    return opcodes, loop


def read_assembler_version() -> str:
    """The version of ptxas that makes the machine code: "13.5.37"."""
    return _find(r", V([0-9.]+)", _run_tool("ptxas", "--version"))


def _run_tool(name: str, *arguments: str | Path) -> str:
    installed = [Path(root, "nvidia", "cu13", "bin", name) for root in sys.path]
    tool = next((path for path in installed if path.exists()), None) or shutil.which(name)
    if tool is None:
        raise FileNotFoundError(f"{name} is not installed: see the docstring of {__file__}")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr}")
    return done.stdout + done.stderr


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"nothing matches {pattern!r} in: {text[:500]}")
    return found.group(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", metavar="MODULE:LISTER")
    parser.add_argument("--arch", default="sm_90a", choices=TARGETS)
    parser.add_argument("--json", action="store_true", help="one object: case -> list of kernels")
    parser.add_argument("--sass", type=Path, metavar="FOLDER", help="write the disassemblies there")
    options = parser.parse_args()
    module, lister = options.cases.split(":")
    cases = getattr(importlib.import_module(module), lister)()
    reports = {name: compile(fn, *specs, arch=options.arch) for name, (fn, specs) in cases.items()}
    if options.sass:
        options.sass.mkdir(parents=True, exist_ok=True)
    for name, kernels in reports.items():
        for kernel in kernels:
            if options.sass:
                (options.sass / f"{name}.{kernel.name}.sass").write_text(kernel.sass)
            if not options.json:
                print(f"{name}: {kernel}")
    if options.json:
        print(json.dumps({name: [k.to_dict() for k in found] for name, found in reports.items()}))


if __name__ == "__main__":
    main()
