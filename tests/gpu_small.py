"""The kernels between the products, at the shapes of published models, for `tests.gpu_check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.formulas.norms import Norm, Onto
from pallas_kernels.triton.add_norm import Experts, finish_rows
from pallas_kernels.triton.parts import Parts

BF16, F32 = jnp.bfloat16, jnp.float32


class Small(NamedTuple):
    """What is compiled: `fn(*specs)`, whose kernels have `only` in their names."""

    fn: Callable[..., Any]
    specs: tuple[Any, ...]
    only: str


def list_small() -> dict[str, Small]:
    """What it does, and for which model and batch -> the kernel."""
    return dict(_list_add_norm())


def describe(*shape: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _list_add_norm() -> Iterator[tuple[str, Small]]:
    for model, rows, hidden, splits in (
        ("Llama-3.1-8B", 1, 4096, 8),
        ("Llama-3.1-8B", 16, 4096, 4),
        ("Qwen3.6-27B", 1, 5120, 8),
    ):

        def run(sums, residual, weight):
            return finish_rows(Parts(sums), Onto(residual, early=Norm(weight, 1e-5, "rounded")))

        specs = describe(splits, rows, hidden, dtype=F32), describe(rows, hidden), describe(hidden)
        yield f"add and norm, {model}, batch {rows}", Small(run, specs, "add_norm")

    def run_experts(sums, residual, weight, local):
        onto = Onto(residual, early=Norm(weight, 1e-6, "rounded"))
        return finish_rows(Parts(sums), onto, Experts(local, 128))

    specs = describe(4, 8, 2048, dtype=F32), describe(1, 2048), describe(2048)
    yield (
        "add experts and norm, Qwen3-30B-A3B, batch 1",
        Small(run_experts, (*specs, describe(8, dtype=jnp.int32)), "add_norm"),
    )
