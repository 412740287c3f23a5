"""The kernels' machine code for GPUs that are not there: compiled, read, and held to its limits.

    python -m tests.gpu_check                 every case; writes docs/machine_code.md
    python -m tests.gpu_check --core --json   the few that the tests hold, as JSON

For the path that the compiler needs see `tests.gpu_aot`; `make gpu-check` sets it. A case is what
`pallas_kernels.schedule.choose` makes of a 4096 x 4096 weight with bfloat16 or float16 scales and
zero points, for a number of tokens that leaves masked rows in the tile; or one of both products of
Qwen3-30B-A3B's experts.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels import triton
from pallas_kernels.blocks import Blocks, count_blocks
from pallas_kernels.device import Device
from pallas_kernels.schedule import Schedule, Tiles, choose, describe
from pallas_kernels.schedule_moe import choose_moe
from pallas_kernels.spec import QuantSpec
from pallas_kernels.triton.grouped import Epilogue
from pallas_kernels.weights import make_abstract
from tests import gpu_aot

REPORT = Path(__file__).parents[1] / "docs" / "machine_code.md"
_SIZE = 4096
_TOKENS = (5, 15, 31, 63, 250, 2000)
_GROUPS = (32, 64, 128, _SIZE)
_MAX_REGISTERS = 255
_MAX_SPILL = 16
"""Bytes: the assembler parks a few registers around a loop where that lets one more program run on
a core (96 or 168 registers). In a loop it may fetch one of them, in hundreds of instructions."""
_HIDDEN, _INNER, _EXPERTS, _TOP_K = 2048, 768, 128, 8
_EXPERT_TOKENS = (1, 10, 50, 200, 700, 4096)
_FIRST, _SECOND = "gate and up", "down"

BUDGETS = {(4, 8): 2.5, (4, 16): 2.9, (4, 32): 3.1, (4, 64): 3.4, (4, 128): 3.5, (8, 8): 3.2}
"""Instructions per weight in the whole loop on sm_90a (bfloat16, groups of 128), by bits and tile
of tokens. At 33 weights a clock and core, which is what an H200's memory can deliver at 4 bits,
issuing 128 thread instructions a clock would become the limit at 3.9."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel for one GPU."""

    arch: str
    tokens: int
    bits: int
    dtype: str
    group_size: int
    symmetric: bool = False
    gated: bool = False
    experts: str = ""

    @property
    def spec(self) -> QuantSpec:
        """Of the weight; of one expert's. Groups as long as K are channels."""
        n, k = {"": (_SIZE, _SIZE), _FIRST: (2 * _INNER, _HIDDEN), _SECOND: (_HIDDEN, _INNER)}[
            self.experts
        ]
        return QuantSpec(
            bits=self.bits,
            group_size=k if self.group_size == _SIZE else self.group_size,
            symmetric=self.symmetric,
            in_features=k,
            out_features=n,
        )

    @property
    def device(self) -> Device:
        target = gpu_aot.TARGETS[self.arch]
        return Device(target.device_kind, target.cores)

    def choose(self) -> tuple[Schedule, bool]:
        """The schedule, and whether one program computes gate and up."""
        if not self.experts:
            schedule = choose(self.spec, self.tokens, self.dtype, self.dtype, self.device)
            if not self.gated or not isinstance(schedule, Tiles):
                return schedule, False
            schedule = dataclasses.replace(schedule, splits=1)
            return schedule, triton.can_pair(self.spec, schedule, self.device)
        specs = tuple(dataclasses.replace(self, experts=part).spec for part in (_FIRST, _SECOND))
        dtypes = (self.dtype, self.dtype)
        tiles = choose_moe(specs, _EXPERTS, self.tokens, _TOP_K, self.dtype, dtypes, self.device)
        if self.experts == _SECOND:
            return tiles.second, False
        paired = tiles.first.splits == 1
        return tiles.first, paired and triton.can_pair(self.spec, tiles.first, self.device)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of a case; `per_weight` is instructions of the loop, None where there is none."""

    case: Case
    schedule: str
    block_m: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    per_weight: float | None
    opcodes: dict[str, int]

    def find_faults(self) -> list[str]:
        """Everything about this machine code that we do not accept."""
        faults = []
        parked = (n for opcode, n in self.opcodes.items() if opcode.startswith(("STL", "LDL")))
        if self.spill_bytes > _MAX_SPILL or (self.spill_bytes and sum(parked) > 1):
            faults.append(f"{self.spill_bytes} bytes spilled")
        if self.registers > _MAX_REGISTERS:
            faults.append(f"{self.registers} registers")
        if self.shared_bytes > self.shared_limit:
            faults.append(f"{self.shared_bytes} of {self.shared_limit} bytes of shared memory")
        if self.per_weight is None:
            return faults
        wanted = "HGMMA" if self.case.arch == "sm_90a" and self.block_m >= 16 else "HMMA"
        if not any(wanted in opcode for opcode in self.opcodes):
            faults.append(f"no {wanted} in the loop")
        if not any(op.startswith("LDGSTS") and op.endswith(".128") for op in self.opcodes):
            faults.append("no asynchronous copy of 16 bytes in the loop")
        budget = BUDGETS.get((self.case.bits, self.block_m))
        typical = (self.case.arch, self.case.dtype, self.case.group_size)
        if budget and typical == ("sm_90a", "bfloat16", 128) and self.per_weight > budget:
            faults.append(f"{self.per_weight:.2f} instructions per weight, budget {budget}")
        return faults


def list_core() -> list[Case]:
    """Some of the budgeted cases, and of the other schedules and GPUs."""
    typical = [Case("sm_90a", tokens, 4, "bfloat16", 128) for tokens in _TOKENS[::2]]
    return [
        *typical,
        Case("sm_90a", 5, 8, "bfloat16", 128),
        Case("sm_90a", 5, 4, "float16", 32),
        Case("sm_80", 63, 4, "bfloat16", 32),
        Case("sm_100a", 15, 4, "bfloat16", 128),
        Case("sm_90a", 15, 4, "bfloat16", 128, gated=True),
        Case("sm_90a", 50, 4, "bfloat16", 128, experts=_FIRST),
        Case("sm_90a", 200, 4, "bfloat16", 128, experts=_SECOND),
        Case("sm_90a", 4096, 4, "bfloat16", 128, experts=_FIRST),
    ]


def list_all() -> list[Case]:
    """Every GPU x tokens x bits x dtype x group size; some without zero points, some gated."""
    whole = itertools.product(gpu_aot.TARGETS, _TOKENS, (4, 8), ("bfloat16", "float16"), _GROUPS)
    plain = itertools.product(("sm_90a",), _TOKENS, (4, 8), ("bfloat16",), (128,), (True,))
    gated = itertools.product(("sm_90a",), _TOKENS[:3], (4, 8), ("bfloat16",), _GROUPS)
    cases = [Case(*facts) for facts in (*whole, *plain)]
    return [*cases, *(Case(*facts, gated=True) for facts in gated), *_list_experts()]


def _list_experts() -> Iterator[Case]:
    """On Hopper as many as of dense weights, on the others the typical ones."""
    hopper = itertools.product(("sm_90a",), _EXPERT_TOKENS, (4, 8), ("bfloat16",), _GROUPS)
    half = itertools.product(("sm_90a",), _EXPERT_TOKENS[::2], (4, 8), ("float16",), (128,))
    others = itertools.product(
        [arch for arch in gpu_aot.TARGETS if arch != "sm_90a"],
        (10, 200, 4096),
        (4, 8),
        ("bfloat16",),
        (32, 128),
    )
    for facts in (*hopper, *half, *others):
        yield Case(*facts, experts=_FIRST)
        yield Case(*facts, experts=_SECOND)


def compile_case(case: Case) -> Finding:
    """Compile one case and read its kernel."""
    schedule, paired = case.choose()
    if case.experts and isinstance(schedule, Tiles):
        kernels = _compile_experts(case, schedule, paired)
    else:
        kernels = _compile_dense(case, schedule)
    # XLA's own kernel, which adds the splits, is short
    kernel = max(kernels, key=lambda kernel: kernel.opcodes.total())
    block_m, per_weight = 0, None
    if isinstance(schedule, Tiles):
        block_m = schedule.block_m
        weights = schedule.block_n * schedule.block_k * (2 if paired else 1)
        per_weight = kernel.loop.total() * 32 * schedule.warps / weights
    return Finding(
        case,
        describe(schedule, case.tokens),
        block_m,
        kernel.registers,
        kernel.spill_bytes,
        kernel.shared_bytes,
        kernel.shared_limit,
        per_weight,
        dict(kernel.opcodes if per_weight is None else kernel.loop),
    )


def _compile_experts(case: Case, tiles: Tiles, paired: bool) -> list[gpu_aot.Kernel]:
    first, spec = case.experts == _FIRST, case.spec
    pairs = case.tokens * _TOP_K
    count = count_blocks(pairs, _EXPERTS, tiles.block_m)
    epilogue = Epilogue("silu" if paired else None, paired, None if first else "result")

    def run(x, stack, experts, rows, weights):
        return triton.multiply_blocks(
            x,
            stack,
            spec,
            Blocks(experts, rows),
            weights,
            tiles,
            epilogue=epilogue,
            dtype=case.dtype if tiles.splits == 1 else jnp.float32,
        )

    return gpu_aot.compile(
        run,
        jax.ShapeDtypeStruct((case.tokens if first else pairs, spec.in_features), case.dtype),
        make_abstract(spec, case.dtype, experts=_EXPERTS),
        jax.ShapeDtypeStruct((count,), jnp.int32),
        jax.ShapeDtypeStruct((count, tiles.block_m), jnp.int32),
        jax.ShapeDtypeStruct((pairs,), jnp.float32),
        arch=case.arch,
    )


def _compile_dense(case: Case, schedule: Schedule) -> list[gpu_aot.Kernel]:
    spec, count = case.spec, 2 if case.gated else 1

    def run(x, packed, scale, zero_point=None):
        weights = {"packed": packed, "scale": scale}
        if zero_point is not None:
            weights["zero_point"] = zero_point
        if isinstance(schedule, Tiles):
            each, specs = [weights] * count, [spec] * count
            return triton.multiply(x, each, specs, schedule, gated=case.gated)
        return triton.expand(weights, spec, case.dtype)

    shapes = [
        jax.ShapeDtypeStruct((case.tokens, _SIZE), case.dtype),
        jax.ShapeDtypeStruct(spec.packed_shape, jnp.uint16),
        jax.ShapeDtypeStruct(spec.scale_shape, case.dtype),
    ]
    if not case.symmetric:
        shapes.append(jax.ShapeDtypeStruct(spec.scale_shape, jnp.int8))
    return gpu_aot.compile(run, *shapes, arch=case.arch)


def write_report(findings: list[Finding]) -> str:
    """The table of all findings, in Markdown."""
    lines = [
        "# Machine code of the kernels",
        "",
        "Made by `make gpu-check`, without a GPU; not edited by hand. It shows code, not time.",
        f"jax {jax.__version__}, weight {_SIZE} x {_SIZE}, asymmetric unless marked, masked token "
        "rows. Gate and up, and down, are of Qwen3-30B-A3B's experts.",
        "",
        "Each cell: instructions per weight in the main loop · registers per thread · KiB of "
        "shared memory",
        "(for prefill, the kernel that expands the weight: instructions · registers).",
    ]
    if faulty := [f for f in findings if f.find_faults()]:
        lines += ["", "**Faults**", ""]
        lines += [f"- {f.case}: {'; '.join(f.find_faults())}" for f in faulty]
    for arch, group in itertools.groupby(
        sorted(findings, key=lambda f: list(gpu_aot.TARGETS).index(f.case.arch)),
        key=lambda f: f.case.arch,
    ):
        lines += ["", f"## {arch} ({gpu_aot.TARGETS[arch].device_kind})", ""]
        lines += _write_table(list(group))
    return "\n".join(lines) + "\n"


def _write_table(findings: list[Finding]) -> list[str]:
    columns = ["channel" if g == _SIZE else f"group {g}" for g in _GROUPS]
    rows: dict[tuple, dict[int, str]] = {}
    for f in findings:
        c = f.case
        key = (c.experts, c.gated, c.symmetric, c.tokens, c.bits, c.dtype)
        rows.setdefault(key, {})[c.group_size] = _write_cell(f)
    lines = [
        f"| tokens | weight | x | {' | '.join(columns)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in columns)} |",
    ]
    for (experts, gated, symmetric, tokens, bits, dtype), cells in sorted(rows.items()):
        facts = (experts, experts), ("symmetric", symmetric), ("gated", gated)
        marks = [mark for mark, is_set in facts if is_set]
        weight = ", ".join([f"{bits} bits", *marks])
        values = " | ".join(cells.get(group, "") for group in _GROUPS)
        lines.append(f"| {tokens} | {weight} | {dtype} | {values} |")
    return lines


def _write_cell(finding: Finding) -> str:
    if finding.per_weight is None:
        return f"{sum(finding.opcodes.values())} · {finding.registers}"
    kib = finding.shared_bytes / 1024
    return f"{finding.per_weight:.2f} · {finding.registers} · {kib:.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the kernels and read their machine code.")
    parser.add_argument("--core", action="store_true", help="only the cases that the tests hold")
    parser.add_argument("--json", action="store_true", help="print the findings, write no report")
    options = parser.parse_args()
    cases = list_core() if options.core else list_all()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        findings = []
        for finding in pool.map(compile_case, cases):
            findings.append(finding)
            faults = finding.find_faults()
            print(f"{finding.case}: {'; '.join(faults) or 'good'}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps([{**dataclasses.asdict(f), "faults": f.find_faults()} for f in findings]))
    else:
        REPORT.write_text(write_report(findings))
    return int(any(f.find_faults() for f in findings))


if __name__ == "__main__":
    sys.exit(main())
