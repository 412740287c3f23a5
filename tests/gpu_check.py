"""The kernels' machine code for GPUs that are not there: compiled, read, and held to its limits.

    python -m tests.gpu_check                 every case; writes docs/machine_code.md
    python -m tests.gpu_check --core --json   the few that the tests hold, as JSON
    python -m tests.gpu_check --only sm_89 group_size=16    those whose text has all of these
    python -m tests.gpu_check --drawn 40      tiles drawn from the tuner's candidates

For the path that the compiler needs see `tests.gpu_aot`; `make gpu-check` sets it. The cases are in
`tests.gpu_cases`.
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
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.format.weights import make_abstract
from pallas_kernels.tiles.blocks import Blocks, count_blocks
from pallas_kernels.tiles.dense_rules import count_programs, describe
from pallas_kernels.tiles.tiles import Schedule, Tiles, measure_shared_memory
from pallas_kernels.triton.dense import expand_by_kernel, multiply_packed
from pallas_kernels.triton.grouped import Epilogue, multiply_blocks
from pallas_kernels.triton.grouping import group_few_pairs
from tests import gpu_aot
from tests.gpu_attention import Decode, write_attention
from tests.gpu_cases import (
    EXPERTS,
    FIRST,
    GROUPS,
    MIXED_GROUPS,
    SIZE,
    TOP_K,
    AnyCase,
    Between,
    Case,
    Grouping,
    draw_cases,
    list_all,
    list_core,
)
from tests.gpu_small import list_small

REPORT = Path(__file__).parents[1] / "docs" / "machine_code.md"
_MAX_REGISTERS = 255
_MAX_SPILL = 16
"""Bytes: the assembler parks a few registers around a loop where that lets one more program run on
a core (96 or 168 registers). In a loop it may fetch one of them, in hundreds of instructions."""

_TENSOR_COLUMNS = 512

BUDGETS = {(4, 8): 2.5, (4, 16): 2.9, (4, 32): 3.1, (4, 64): 3.4, (4, 128): 3.5, (8, 8): 3.2}
"""Instructions per weight in the whole loop on sm_90a (bfloat16, groups of 128), by bits and tile
of tokens. At 33 weights a clock and core, which is what an H200's memory can deliver at 4 bits,
issuing 128 thread instructions a clock would become the limit at 3.9."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of a case.

    Attributes:
      estimated_bytes: of shared memory that the schedule was thought to take; None without one.
      programs: how many the schedule was made for on each core.
      per_weight: instructions of the loop, None where no weight is multiplied; in attention per
        number of the cache.
    """

    case: AnyCase
    schedule: str
    block_m: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    estimated_bytes: int | None
    tensor_columns: int
    programs: int
    per_weight: float | None
    opcodes: dict[str, int]

    def find_faults(self) -> list[str]:
        """Everything about this machine code that we do not accept."""
        faults = []
        parked = (n for opcode, n in self.opcodes.items() if opcode.startswith(("STL", "LDL")))
        most = 0 if isinstance(self.case, Decode) else _MAX_SPILL
        if self.spill_bytes > most or (self.spill_bytes and sum(parked) > 1):
            faults.append(f"{self.spill_bytes} bytes spilled")
        if self.registers > _MAX_REGISTERS:
            faults.append(f"{self.registers} registers")
        if self.shared_bytes > self.shared_limit:
            faults.append(f"{self.shared_bytes} of {self.shared_limit} bytes of shared memory")
        if self.estimated_bytes is not None and self.shared_bytes > self.estimated_bytes:
            faults.append(f"{self.shared_bytes} bytes of shared memory, not {self.estimated_bytes}")
        if self.programs * self.tensor_columns > _TENSOR_COLUMNS:
            faults.append(
                f"{self.programs} programs a core with {self.tensor_columns} of "
                f"{_TENSOR_COLUMNS} columns of tensor memory each"
            )
        if self.per_weight is None or not isinstance(self.case, Case | Decode):
            return faults
        wanted = "HGMMA" if self.case.arch == "sm_90a" and self.block_m >= 16 else "HMMA"
        if not any(wanted in opcode for opcode in self.opcodes):
            faults.append(f"no {wanted} in the loop")
        if not any(op.startswith("LDGSTS") and op.endswith(".128") for op in self.opcodes):
            faults.append("no asynchronous copy of 16 bytes in the loop")
        budget = self._find_budget(self.case)
        if budget and self.per_weight > budget:
            faults.append(f"{self.per_weight:.2f} instructions per weight, budget {budget}")
        return faults

    def _find_budget(self, case: Case | Decode) -> float | None:
        if isinstance(case, Decode):
            return case.budget
        is_typical = (case.arch, case.dtype, case.group_size) == ("sm_90a", "bfloat16", 128)
        return BUDGETS.get((case.bits, self.block_m)) if is_typical else None


def compile_case(case: AnyCase) -> Finding:
    """Compile one case and read its kernel."""
    block_m, estimated, programs, per_weight = 0, None, 1, None
    if isinstance(case, Grouping):
        schedule, kernels = f"blocks of {case.block} rows", _compile_grouping(case)
    elif isinstance(case, Between):
        small = list_small()[case.name]
        schedule, kernels = (
            "",
            gpu_aot.compile(small.fn, *small.specs, arch=case.arch, only=small.only),
        )
    elif isinstance(case, Decode):
        schedule, kernels, block_m = str(case.choose()), case.compile(), case.block_heads
    else:
        schedule, paired = case.choose()
        if case.experts and isinstance(schedule, Tiles):
            kernels = _compile_experts(case, schedule, paired)
        else:
            kernels = _compile_dense(case, schedule)
    [kernel] = kernels
    if isinstance(case, Decode):
        per_weight = case.count_per_number(kernel)
    if isinstance(schedule, Tiles):
        block_m = schedule.block_m
        whole = dataclasses.replace(schedule, block_n=schedule.block_n * (2 if paired else 1))
        estimated = measure_shared_memory(whole, case.spec, case.scale_dtype)
        weights = whole.block_n * whole.block_k
        per_weight = kernel.loop.total() * 32 * schedule.warps / weights
        programs = count_programs(schedule, case.spec, case.device)
    return Finding(
        case,
        describe(schedule, case.tokens) if isinstance(case, Case) else schedule,
        block_m,
        kernel.registers,
        kernel.spill_bytes,
        kernel.shared_bytes,
        kernel.shared_limit,
        estimated,
        kernel.tensor_columns,
        programs,
        per_weight,
        dict(kernel.opcodes if per_weight is None else kernel.loop),
    )


def _compile_grouping(case: Grouping) -> list[gpu_aot.Kernel]:
    return gpu_aot.compile(
        lambda local: group_few_pairs(local, case.experts, case.block),
        jax.ShapeDtypeStruct((case.pairs,), jnp.int32),
        arch=case.arch,
        only="_group_one",
    )


def _compile_experts(case: Case, tiles: Tiles, paired: bool) -> list[gpu_aot.Kernel]:
    first, spec = case.experts == FIRST, case.spec
    pairs = case.tokens * TOP_K
    count = count_blocks(pairs, EXPERTS, tiles.block_m)
    epilogue = Epilogue("silu" if paired else None, paired, None if first else "result")

    def run(x, stack, experts, rows, weights):
        return multiply_blocks(
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
        make_abstract(spec, case.scale_dtype, experts=EXPERTS),
        jax.ShapeDtypeStruct((count,), jnp.int32),
        jax.ShapeDtypeStruct((count, tiles.block_m), jnp.int32),
        jax.ShapeDtypeStruct((pairs,), jnp.float32),
        arch=case.arch,
        only="_multiply_block",
    )


def _compile_dense(case: Case, schedule: Schedule) -> list[gpu_aot.Kernel]:
    spec, count = case.spec, 2 if case.gated else 1

    def run(x, weights):
        if isinstance(schedule, Tiles):
            each, specs = [weights] * count, [spec] * count
            activation = "silu" if case.gated else None
            return multiply_packed(x, each, specs, schedule, activation=activation)
        return expand_by_kernel(weights, spec, case.dtype)

    return gpu_aot.compile(
        run,
        jax.ShapeDtypeStruct((case.tokens, spec.in_features), case.dtype),
        make_abstract(spec, case.scale_dtype),
        arch=case.arch,
        only="_multiply_tile" if isinstance(schedule, Tiles) else "_expand_tile",
    )


def write_report(findings: list[Finding]) -> str:
    """The table of all findings, in Markdown."""
    lines = [
        "# Machine code of the kernels",
        "",
        "Made by `make gpu-check`, without a GPU; not edited by hand. It shows code, not time.",
        f"jax {jax.__version__}, ptxas {gpu_aot.read_assembler_version()}; another ptxas makes "
        "other code.",
        f"Weight {SIZE} x {SIZE} (groups of 48 and 80: {SIZE} x 3840), asymmetric unless marked. "
        "Gate and up, and down, are of Qwen3-30B-A3B's experts (for those groups of 1920 x 960).",
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
        group = list(group)
        products = [f for f in group if isinstance(f.case, Case)]
        for groups in (GROUPS, MIXED_GROUPS):
            lines += _write_table([f for f in products if f.case.group_size in groups], groups)
        lines += _write_groupings([f for f in group if isinstance(f.case, Grouping)])
        lines += _write_between([f for f in group if isinstance(f.case, Between)])
        lines += write_attention([f for f in group if isinstance(f.case, Decode)])
    return "\n".join(lines) + "\n"


def _write_table(findings: list[Finding], groups: Sequence[int]) -> list[str]:
    if not findings:
        return []
    columns = ["channel" if g == SIZE else f"group {g}" for g in groups]
    rows: dict[tuple, dict[int, str]] = {}
    for f in findings:
        c = f.case
        scales = "" if c.scale_dtype == c.dtype else f"{c.scale_dtype} scales"
        key = (c.experts, c.gated, c.symmetric, scales, c.tokens, c.bits, c.dtype)
        rows.setdefault(key, {})[c.group_size] = _write_cell(f)
    lines = [
        f"| tokens | weight | x | {' | '.join(columns)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in columns)} |",
    ]
    for (experts, gated, symmetric, scales, *rest), cells in sorted(rows.items()):
        tokens, bits, dtype = rest
        facts = (experts, experts), ("symmetric", symmetric), ("gated", gated), (scales, scales)
        marks = [mark for mark, is_set in facts if is_set]
        weight = ", ".join([f"{bits} bits", *marks])
        values = " | ".join(cells.get(group, "") for group in groups)
        lines.append(f"| {tokens} | {weight} | {dtype} | {values} |")
    return [*lines, ""]


def _write_groupings(findings: list[Finding]) -> list[str]:
    if not findings:
        return []
    lines = ["| pairs grouped by expert | instructions | registers |", "| --- | --- | --- |"]
    for f in findings:
        facts = f"{f.case.pairs} pairs, {f.case.experts} experts"
        lines.append(f"| {facts} | {sum(f.opcodes.values())} | {f.registers} |")
    return [*lines, ""]


def _write_between(findings: list[Finding]) -> list[str]:
    if not findings:
        return []
    head = "| between the products | instructions | registers | KiB of shared memory |"
    lines = [head, "| --- | --- | --- | --- |"]
    for f in findings:
        figures = f"{sum(f.opcodes.values())} | {f.registers} | {f.shared_bytes / 1024:.1f}"
        lines.append(f"| {f.case.name} | {figures} |")
    return [*lines, ""]


def _write_cell(finding: Finding) -> str:
    if finding.per_weight is None:
        return f"{sum(finding.opcodes.values())} · {finding.registers}"
    kib = finding.shared_bytes / 1024
    return f"{finding.per_weight:.2f} · {finding.registers} · {kib:.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the kernels and read their machine code.")
    parser.add_argument("--core", action="store_true", help="only the cases that the tests hold")
    parser.add_argument("--json", action="store_true", help="print the findings, write no report")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="fewer cases")
    parser.add_argument("--drawn", type=int, metavar="N", help="N candidates of the tuner")
    parser.add_argument("--seed", type=int, default=0, help="of those")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N")
    options = parser.parse_args()
    if options.drawn:
        cases = draw_cases(options.drawn, options.seed)
    else:
        cases = list_core() if options.core else list_all()
    cases = [case for case in cases if all(text in str(case) for text in options.only)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, context) as pool:
        findings = []
        for finding in pool.map(compile_case, cases):
            findings.append(finding)
            faults = finding.find_faults()
            print(f"{finding.case}: {'; '.join(faults) or 'good'}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps([{**dataclasses.asdict(f), "faults": f.find_faults()} for f in findings]))
    elif not (options.core or options.only or options.drawn):
        REPORT.write_text(write_report(findings))
    return int(any(f.find_faults() for f in findings))


if __name__ == "__main__":
    sys.exit(main())
