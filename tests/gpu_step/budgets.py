"""What a step may cost: the numbers that a change of a kernel or of a fusion is held to."""

from __future__ import annotations

from tests.gpu_step.readings import Program, Reading

BUDGETS: dict[tuple[str, str], int] = {
    ("Llama-3.1-8B", "attention"): 9,
    ("Qwen3-30B-A3B", "attention"): 12,
    ("Qwen3.6-27B", "attention"): 9,
    ("Qwen3.6-27B, all packed", "attention"): 9,
    ("Qwen3.6-27B, all packed", "delta net"): 12,
}
"""Kernels of a layer of a model, by its kind, in a decode step of few rows."""

BUDGET_BATCHES = (1, 16)


def find_budget(program: Program, kind: str) -> int | None:
    """Kernels that a layer may have; None where nothing is said."""
    if program.kind != "decode" or program.size not in BUDGET_BATCHES:
        return None
    return BUDGETS.get((program.model, kind))


def count_layer(reading: Reading, kind: str) -> int:
    """Kernels of a typical layer of a kind."""
    return sum(kernel.launches for kernel in reading.list_layer(reading.find_typical(kind)))


def find_faults(reading: Reading) -> list[str]:
    """Everything about a program that is not accepted."""
    faults = []
    for kind in dict.fromkeys(reading.kinds):
        count, budget = count_layer(reading, kind), find_budget(reading.program, kind)
        if budget and count > budget:
            faults.append(f"{count} kernels a layer of {kind}, budget {budget}")
    for kernel in (*reading.kernels, *reading.sampled):
        if kernel.copies_cache:
            faults.append(f"{kernel.name} ({kernel.source}) writes a whole cache")
        if kernel.scores:
            faults.append(f"{kernel.name} ({kernel.source}) writes {kernel.scores} scores")
    return list(dict.fromkeys(faults))
