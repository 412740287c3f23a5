"""Which programs are compiled."""

from __future__ import annotations

from tests.gpu_step.readings import Program

MODELS = (
    "Llama-3.1-8B",
    "Qwen3-30B-A3B",
    "Qwen3.6-27B",
    "Qwen3.6-27B, all packed",
    "Qwen3.5-122B-A10B",
)
ARCHS = ("sm_90a", "sm_80")
BATCHES, PIECES = (1, 16, 64), (512, 2048)
LAYERS = 4
"""A whole period of the hybrid models, and enough of the others: one stands between two."""

_SMALL = {"vocab_size": 1024}
"""The head and what draws from it are apart from the layers, and take long to compile."""


def list_programs(layers: int, *, whole: bool) -> list[Program]:
    """All that the report is about."""
    cases = [("decode", batch) for batch in BATCHES] + [("prefill", piece) for piece in PIECES]
    programs = [
        Program(model, arch, kind, size, layers)
        for model in MODELS
        for arch in ARCHS
        for kind, size in cases
    ]
    if whole:
        programs += [Program(model, ARCHS[0], "decode", 1, None) for model in MODELS]
    return programs


def list_core() -> list[Program]:
    """What the tests hold: attention and experts, whose layers are those of the whole model."""
    return [Program("Qwen3-30B-A3B", "sm_90a", "decode", 16, 3, _SMALL)]
