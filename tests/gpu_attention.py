"""What `tests.gpu_check` compiles of decode attention: its kernel and the combine, a case each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.formulas.norms import Norm
from pallas_kernels.formulas.rotation import Rotation
from pallas_kernels.tiles.attention.decode_rules import Division, choose_division
from pallas_kernels.tiles.device import Device
from pallas_kernels.triton.parts import Parts
from pallas_kernels.triton.step.decode_attention import attend_token
from tests import gpu_aot

SLOTS = 4096
_PARTS = 4
"""Of the products of q, k and v: a batch of one splits them."""

BUDGET = {64: 2.7, 128: 2.5, 256: 2.7, 512: 3.2}
"""Instructions per number of the cache on sm_90a, by size of a head, for up to 8 heads a key head.
An H200's memory brings 11 numbers a clock and core, so issuing would become the limit at 12."""


@dataclasses.dataclass(frozen=True)
class Decode:
    """One of the two kernels of a step, as `attend_token` runs them.

    Attributes:
      heads: query heads of a key head.
      combine: the second kernel.
    """

    arch: str
    head_dim: int
    heads: int
    dtype: str
    rows: int = 1
    kv_heads: int = 8
    rotated: int = 0
    norm: str = ""
    gated: bool = False
    window: int | None = None
    combine: bool = False

    @property
    def device(self) -> Device:
        target = gpu_aot.TARGETS[self.arch]
        return Device(target.device_kind, target.cores)

    @property
    def block_heads(self) -> int:
        return 16 if self.heads > 8 else 8

    def choose(self) -> Division:
        lines = self.rows * self.kv_heads * -(-self.heads // 16)
        return choose_division(lines, SLOTS, self.head_dim, self.head_dim, self.device)

    def compile(self) -> list[gpu_aot.Kernel]:
        """The kernel; none for the combine where one program has all slots."""
        size, pairs = self.head_dim, (self.rotated or self.head_dim) // 2
        kv = self.kv_heads * size
        q = kv * self.heads * (2 if self.gated else 1)
        lines = (self.rows * self.kv_heads, SLOTS, size)

        def run(q, k, v, weights, rotation, position, active, caches):
            norms = [Norm(w, 1e-6, self.norm) if self.norm else None for w in weights]
            return attend_token(
                Parts(q),
                Parts(k),
                Parts(v),
                q_norm=norms[0],
                k_norm=norms[1],
                rotation=Rotation(*rotation),
                position=position,
                active=active,
                cache_k=caches[0],
                cache_v=caches[1],
                kv_heads=self.kv_heads,
                window=self.window,
                gated=self.gated,
            )

        def shape(*sizes: int, dtype=self.dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, dtype)

        parts = [shape(_PARTS, self.rows, n, dtype=jnp.float32) for n in (q, kv, kv)]
        integers = [shape(self.rows, dtype=jnp.int32)] * 2
        return gpu_aot.compile(
            run,
            *parts,
            [shape(size)] * 2,
            (shape(self.rows, pairs),) * 2,
            *integers,
            [shape(*lines)] * 2,
            arch=self.arch,
            only="flash_combine" if self.combine else "flash_decode",
        )

    def count_per_number(self, kernel: gpu_aot.Kernel) -> float | None:
        """Instructions of the loop for each number of the cache; None for the combine."""
        if self.combine:
            return None
        found = self.choose()
        return kernel.loop.total() * 32 * found.warps / (found.block * 2 * self.head_dim)

    @property
    def budget(self) -> float | None:
        """Of these."""
        is_typical = self.arch == "sm_90a" and self.dtype == "bfloat16" and self.heads <= 8
        return BUDGET.get(self.head_dim) if is_typical and not self.combine else None


def list_core_attention() -> list[Decode]:
    """Those of Llama-3.1-8B and of Qwen3.6-27B, and the largest head."""
    return [
        Decode("sm_90a", 128, 4, "bfloat16"),
        Decode("sm_90a", 256, 6, "bfloat16", 1, 4, 64, "offset", True),
        Decode("sm_80", 512, 16, "bfloat16", norm="wide"),
        Decode("sm_90a", 128, 4, "bfloat16", combine=True),
    ]


def list_attention() -> Iterator[Decode]:
    """Sizes of a head and groups, kinds of models, and batches."""
    archs, b = tuple(gpu_aot.TARGETS), "bfloat16"
    for facts in itertools.product(archs, (64, 128, 256, 512), (1, 4, 8, 16), (b,)):
        yield Decode(*facts, norm="rounded")
    for facts in itertools.product(archs, (64, 80, 96, 112, 128, 192), (5,), ("float16",)):
        yield Decode(*facts, window=1024)
    for arch, rows in itertools.product(archs, (1, 16, 64)):
        yield Decode(arch, 128, 4, b, rows)
        yield Decode(arch, 128, 8, b, rows, 4, norm="rounded")
        yield Decode(arch, 256, 6, b, rows, 4, 64, "offset", True)
    for facts in itertools.product(archs, (64, 128, 192, 256, 512), (4,), (b,)):
        yield Decode(*facts, combine=True)
    for arch in archs:
        yield Decode(arch, 256, 6, b, 1, 4, 64, "offset", True, combine=True)


def write_attention(findings: list) -> list[str]:
    """Rows of docs/machine_code.md."""
    if not findings:
        return []
    lines = [
        "| attention of a token | heads a key head | rows | x | per number · registers · KiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for f in findings:
        case: Decode = f.case
        marks = [
            f"heads of {case.head_dim}",
            *([f"{case.norm} norm"] if case.norm else []),
            *(["gated"] if case.gated else []),
            *([f"window {case.window}"] if case.window else []),
            *(["combine"] if case.combine else []),
        ]
        cost = f"{f.per_weight:.2f}" if f.per_weight else f"{sum(f.opcodes.values())} in all"
        cell = f"{cost} · {f.registers} · {f.shared_bytes / 1024:.0f}"
        lines.append(f"| {', '.join(marks)} | {case.heads} | {case.rows} | {case.dtype} | {cell} |")
    return [*lines, ""]
