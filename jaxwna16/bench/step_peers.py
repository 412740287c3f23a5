"""Other projects' attention of one token a row over a cache, keys and values [B, C, heads, D]."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxwna16.bench.rounds import time_rounds
from jaxwna16.bench.step_cases import StepCase
from jaxwna16.bench.timing import Effort, Timing, measure


def _time_jax(case: StepCase, effort: Effort, implementation: Literal["cudnn", "xla"]) -> Timing:
    m, chain = case.model, case.count_chain(effort)
    line = (case.rows, case.slots, m.kv_heads, m.head_dim)
    q = jax.random.normal(jax.random.key(0), (case.rows, 1, m.heads, m.head_dim), case.dtype)
    caches = [
        tuple(jax.random.normal(jax.random.key(2 * i + j), line, case.dtype) for j in range(2))
        for i in range(chain)
    ]
    seen = jnp.full(case.rows, case.seen + 1, jnp.int32)

    def advance(fixed, q):
        caches, seen = fixed
        for k, v in caches:  # each takes what came before as its queries, and so waits for it
            q = jax.nn.dot_product_attention(
                q, k, v, key_value_seq_lengths=seen, implementation=implementation
            )
        return q

    return time_rounds((caches, seen), q, advance, chain, effort)


def _time_torch(case: StepCase, effort: Effort, prepare: Callable) -> Timing:
    """A function of PyTorch, called again and again; the host's work counts if it is longer."""
    torch = importlib.import_module("torch")
    m, chain = case.model, case.count_chain(effort)
    place = {"device": "cuda", "dtype": getattr(torch, case.dtype)}
    q = torch.randn(case.rows, 1, m.heads, m.head_dim, **place)
    line = (case.rows, case.slots, m.kv_heads, m.head_dim)
    caches = [(torch.randn(line, **place), torch.randn(line, **place)) for _ in range(chain)]
    seen = torch.full((case.rows,), case.seen + 1, dtype=torch.int32, device="cuda")
    attend = prepare(q, seen, case.seen + 1)

    def call(made: int) -> Any:
        del made
        return [attend(k, v) for k, v in caches][-1]

    return measure(call, lambda _: torch.cuda.synchronize(), effort, products=chain)


def _prepare_flash_attn(q, seen, count: int) -> Callable:
    flash_attn = importlib.import_module("flash_attn")
    del count
    return lambda k, v: flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=seen)


def _prepare_flashinfer(q, seen, count: int) -> Callable:
    flashinfer = importlib.import_module("flashinfer")
    del seen
    if q.shape[0] > 1:
        raise ValueError("one row only: for several it needs a paged cache")
    attend = flashinfer.single_decode_with_kv_cache
    return lambda k, v: attend(q[0, 0], k[0, :count], v[0, :count])


PEERS: dict[str, Callable[[StepCase, Effort], Timing]] = {
    "jax.nn cudnn": lambda case, effort: _time_jax(case, effort, "cudnn"),
    "jax.nn xla": lambda case, effort: _time_jax(case, effort, "xla"),
    "flash_attn": lambda case, effort: _time_torch(case, effort, _prepare_flash_attn),
    "flashinfer": lambda case, effort: _time_torch(case, effort, _prepare_flashinfer),
}
_PACKAGES = {"flash_attn": "flash-attn", "flashinfer": "flashinfer-python"}


def find_version(name: str) -> tuple[str | None, str | None]:
    """The version of a peer, or why it is absent."""
    if name.startswith("jax.nn"):
        return jax.__version__, None
    for module in (name, "torch"):
        if importlib.util.find_spec(module) is None:
            return None, f"{module} is not installed"
    try:
        return importlib.metadata.version(_PACKAGES[name]), None
    except importlib.metadata.PackageNotFoundError:
        return None, None
