"""The kernels between the products, at the shapes of published models, for `tests.gpu_check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.formulas.norms import Norm, Onto
from pallas_kernels.formulas.routing_options import Routing
from pallas_kernels.tiles.ahead import fix_ahead
from pallas_kernels.triton.parts import Parts
from pallas_kernels.triton.step.add_norm import Experts, finish_rows
from pallas_kernels.triton.step.delta_rule import step_delta_rule
from pallas_kernels.triton.step.flash import attend_piece
from pallas_kernels.triton.step.routing import choose_experts

BF16, F32 = jnp.bfloat16, jnp.float32


class Small(NamedTuple):
    """What is compiled: `fn(*specs)`, whose kernels have `only` in their names."""

    fn: Callable[..., Any]
    specs: tuple[Any, ...]
    only: str


def list_small() -> dict[str, Small]:
    """What it does, and for which model and batch -> the kernel."""
    kinds = (_list_add_norm, _list_pieces, _list_routings, _list_delta_steps)
    return {name: small for list_kind in kinds for name, small in list_kind()}


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

    def run_ahead(sums, residual, weight, words):
        with fix_ahead(8 << 20):
            norm = Norm(weight, 1e-5, "rounded")
            return finish_rows(Parts(sums), Onto(residual, early=norm, ahead=(words,)))

    specs = describe(8, 1, 4096, dtype=F32), describe(1, 4096), describe(4096)
    words = describe(224, 32, 64, 32, dtype=jnp.uint16)
    name = "add and norm, 8 MiB ahead, Llama-3.1-8B, batch 1"
    yield name, Small(run_ahead, (*specs, words), "add_norm")

    def run_experts(sums, residual, weight, local):
        onto = Onto(residual, early=Norm(weight, 1e-6, "rounded"))
        return finish_rows(Parts(sums), onto, Experts(local, 128))

    specs = describe(4, 8, 2048, dtype=F32), describe(1, 2048), describe(2048)
    yield (
        "add experts and norm, Qwen3-30B-A3B, batch 1",
        Small(run_experts, (*specs, describe(8, dtype=jnp.int32)), "add_norm"),
    )


def _list_pieces() -> Iterator[tuple[str, Small]]:
    """Attention of a piece in the middle of a prompt; Gemma 4's widest heads among them."""
    for model, tokens, heads, kv_heads, head_dim, window, dtype in (
        ("Llama-3.1-8B", 2048, 32, 8, 128, None, BF16),
        ("Llama-3.1-8B", 2048, 32, 8, 128, None, jnp.float16),
        ("Mistral-7B", 2048, 32, 8, 128, 4096, BF16),
        ("SmolLM2-135M", 512, 9, 3, 64, None, BF16),
        ("Qwen3.6-27B", 2048, 24, 4, 256, None, BF16),
        ("gemma-4, windows", 2048, 32, 16, 256, 1024, BF16),
        ("gemma-4, wide heads", 2048, 32, 4, 512, None, BF16),
        ("a head of 80", 16, 32, 32, 80, None, BF16),
    ):

        def run(q, k, v, start, count, window=window):
            return attend_piece(q, k, v, start=start, count=count, window=window)

        cache, bound = describe(kv_heads, 8192, head_dim, dtype=dtype), describe(1, dtype=jnp.int32)
        queries = describe(1, tokens, heads, head_dim, dtype=dtype)
        sixteen = "" if dtype == BF16 else ", float16"
        yield (
            f"attention of {tokens} tokens, {model}{sixteen}",
            Small(run, (queries, cache, cache, bound, bound), "attend_piece"),
        )


def _list_routings() -> Iterator[tuple[str, Small]]:
    deepseek = {"groups": 8, "top_groups": 4, "group_score": "top2_sum"}
    sigmoid = {"top_k": 8, "scoring": "sigmoid", "scaling_factor": 2.5}
    for model, experts, dtype, has_bias, routing in (
        ("Qwen3-30B-A3B", 128, BF16, False, Routing(top_k=8)),
        ("Qwen3.5-122B", 256, BF16, False, Routing(top_k=8)),
        ("DeepSeek-V2", 160, F32, False, Routing(top_k=6, groups=8, top_groups=3)),
        ("DeepSeek-V3", 256, F32, True, Routing(**sigmoid, **deepseek)),
        ("Kimi-K2", 384, F32, True, Routing(**sigmoid)),
        ("DeepSeek-V4", 256, F32, True, Routing(top_k=6, scoring="sqrt_softplus")),
        ("the most experts", 1024, F32, True, Routing(top_k=32)),
    ):

        def run(logits, bias, routing=routing):
            return choose_experts(logits, routing, bias)

        bias = describe(experts, dtype=F32) if has_bias else None
        specs = describe(16, experts, dtype=dtype), bias
        yield f"routing, {model}", Small(run, specs, "choose_experts")


def _list_delta_steps() -> Iterator[tuple[str, Small]]:
    """Of Qwen3.6-27B, and of heads of other sizes."""
    for model, rows, splits, heads, key_heads, size, dtype in (
        ("Qwen3.6-27B, batch 1", 1, 2, 48, 16, 128, BF16),
        ("Qwen3.6-27B, batch 16", 16, 1, 48, 16, 128, BF16),
        ("Qwen3.6-27B, batch 1, float32", 1, 1, 48, 16, 128, F32),
        ("heads of 64", 1, 2, 32, 16, 64, BF16),
        ("heads of 96", 1, 2, 32, 16, 96, jnp.float16),
        ("heads of 256", 1, 2, 16, 16, 256, BF16),
    ):

        def run(products, weights, inputs, state, active, key_heads=key_heads):
            return step_delta_rule(
                *map(Parts, products),
                **weights,
                inputs=inputs,
                state=state,
                active=active,
                key_heads=key_heads,
                norm_eps=1e-6,
            )

        values = heads * size
        features = 2 * key_heads * size + values
        kind = F32 if splits > 1 else dtype
        products = [describe(splits, rows, n, dtype=kind) for n in (features, values, heads, heads)]
        weights = {
            "conv_weight": describe(features, 4, dtype=dtype),
            "A_log": describe(heads, dtype=F32),
            "dt_bias": describe(heads, dtype=F32),
            "norm_weight": describe(size, dtype=dtype),
        }
        cache = (
            describe(rows, 3, features, dtype=dtype),
            describe(rows, heads, size, size, dtype=F32),
        )
        specs = (products, weights, *cache, describe(rows, dtype=jnp.int32))
        yield f"delta rule, {model}", Small(run, specs, "step_delta_rule")
