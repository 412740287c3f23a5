"""What a step may cost: the numbers that a change of a kernel or of a fusion is held to."""

from __future__ import annotations

from tests.gpu_step.readings import Reading

BUDGETS: dict[tuple[str, str], int] = {
    ("Llama-3.1-8B", "attention"): 9,
    ("Qwen3-30B-A3B", "attention"): 12,
    ("Qwen3.6-27B, all packed", "delta net"): 12,
    ("Qwen3.6-27B, all packed", "attention"): 9,
}
"""Kernels of a layer of a model, by its kind, in a decode step of 1 or 16 rows."""

BUDGET_BATCHES = (1, 16)


def find_faults(reading: Reading) -> list[str]:
    """Everything about a program that is not accepted."""
    program, faults = reading.program, []
    if program.kind == "decode" and program.size in BUDGET_BATCHES:
        for kind in dict.fromkeys(reading.kinds):
            budget = BUDGETS.get((program.model, kind))
            layer = reading.list_layer(reading.find_typical(kind))
            count = sum(kernel.launches for kernel in layer)
            if budget and count > budget:
                faults.append(f"{count} kernels a layer of {kind}, budget {budget}")
    for kernel in (*reading.kernels, *reading.sampled):
        if kernel.copies_cache:
            faults.append(f"{kernel.name} ({kernel.source}) writes a whole cache")
        if kernel.scores:
            faults.append(f"{kernel.name} ({kernel.source}) writes {kernel.scores} scores")
    return list(dict.fromkeys(faults))
