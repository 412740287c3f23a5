"""Products that go onto the residual stream, with the norms of `pallas_kernels.formulas.norms`.

On a GPU the sum over the splits of K, the sum with the stream and the norms are one kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import moe
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.formulas.activations import weigh
from pallas_kernels.formulas.norms import Onto, add_norm
from pallas_kernels.lowering import choose_at_lowering, has_symbolic
from pallas_kernels.matmul import check_call, quant_matmul
from pallas_kernels.vmap_rule import fold_vmap
from pallas_kernels.xla.dense import matmul

Weights = Mapping[str, jax.Array]
Stream = tuple[jax.Array, jax.Array | None]
"""The stream [..., N] with the product, and its early norm or None."""


def multiply_onto(
    x: jax.Array,
    weights: Weights,
    spec: QuantSpec,
    onto: Onto,
    *,
    backend: str | None = None,
    prefer: str = "speed",
) -> Stream:
    """`quant_matmul` and then `add_norm`, where `onto.residual` is [..., N] in the dtype of x.

    Raises:
      SpecError, BackendError, TableError: as `quant_matmul`.
    """
    x = check_call(x, [weights], [spec], backend, prefer)
    if has_symbolic(x.shape) or 0 in x.shape:
        return add_norm(quant_matmul(x, weights, spec, backend=backend, prefer=prefer), onto)

    def by_xla(x, weights, onto):
        return add_norm(matmul(x, weights, spec).astype(x.dtype), onto)

    def by_triton(x, weights, onto, *, interpret):
        # imported here, so that all else works where a later jax has no Pallas-Triton
        from pallas_kernels.triton.products import multiply_each
        from pallas_kernels.triton.step.add_norm import finish_rows

        def run(rows, others):
            weights, rest = others
            options = {"prefer": prefer, "interpret": interpret}
            [product] = multiply_each(rows[0], [weights], [spec], **options)
            return finish_rows(product, _put(rest, rows[1]), interpret=interpret)

        return fold_vmap(run)((x, onto.residual), (weights, _put(onto, None)))

    run = choose_at_lowering(by_xla, by_triton, backend, x.dtype)
    return _run_flat(run, x, dict(weights), onto)


def add_onto(y: jax.Array, onto: Onto, *, backend: str | None = None) -> Stream:
    """`add_norm` of y [..., N]."""
    if has_symbolic(y.shape) or 0 in y.shape:
        return add_norm(y, onto)

    def by_triton(y, weights, onto, *, interpret):
        from pallas_kernels.triton.parts import Parts
        from pallas_kernels.triton.step.add_norm import finish_rows

        def run(rows, rest):
            return finish_rows(Parts(rows[0][None]), _put(rest, rows[1]), interpret=interpret)

        return fold_vmap(run)((y, onto.residual), _put(onto, None))

    run = choose_at_lowering(lambda y, _, onto: add_norm(y, onto), by_triton, backend, y.dtype)
    return _run_flat(run, y, {}, onto)


def run_experts_onto(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: Weights,
    w2: Weights,
    spec13: QuantSpec,
    spec2: QuantSpec,
    onto: Onto,
    *,
    options: moe.Options,
    shared: jax.Array | None = None,
    shared_gate: jax.Array | None = None,
    backend: str | None = None,
) -> Stream:
    """`quant_moe` of all experts and then `add_norm`; arguments as there.

    Args:
      ids: each in 0 .. E - 1, as `route` gives them.
      shared_gate: logits [..., 1] whose sigmoid multiplies `shared`.

    Raises:
      SpecError, BackendError, TableError: as `quant_moe`.
    """
    stacks, specs = (dict(w13), dict(w2)), (spec13, spec2)
    call = moe.check_call(x, ids, weights, *stacks, *specs, options, shared, backend)

    def by_xla(x, weights, onto):
        ids, factors, stacks, shared, gate = weights
        y = moe.run_by_xla(call, x, ids, factors, 0, stacks)
        return add_norm(add_shared(y, shared, gate).astype(x.dtype), onto)

    def by_triton(x, weights, onto, *, interpret):
        from pallas_kernels.triton.experts import multiply_experts
        from pallas_kernels.triton.step.add_norm import Experts, finish_rows

        def run(rows, others):
            x, ids, factors, shared, gate, residual = rows
            stacks, rest = others
            product, local = multiply_experts(
                call, (x, ids, factors), None, stacks, interpret=interpret
            )
            experts = Experts(local, call.experts, shared, gate)
            return finish_rows(product, _put(rest, residual), experts, interpret=interpret)

        ids, factors, stacks, shared, gate = weights
        rows = x, ids, factors, shared, gate, onto.residual
        return fold_vmap(run)(rows, (stacks, _put(onto, None)))

    def flatten(leaf):
        return None if leaf is None else leaf.reshape(-1, leaf.shape[-1])

    others = flatten(ids), flatten(weights), stacks
    if 0 in x.shape:
        y = jnp.zeros(onto.residual.shape, jnp.float32)
        return add_norm(add_shared(y, shared, shared_gate).astype(x.dtype), onto)
    run = choose_at_lowering(by_xla, by_triton, backend, x.dtype)
    return _run_flat(run, x, (*others, flatten(shared), flatten(shared_gate)), onto)


def add_shared(y: jax.Array, shared: jax.Array | None, gate: jax.Array | None) -> jax.Array:
    """float32 y [..., N] plus `shared` times the sigmoid of its gate's logits [..., 1]."""
    if shared is None:
        return y
    return y + (shared.astype(jnp.float32) if gate is None else weigh(shared, gate))


def _put(onto: Onto, residual: Any) -> Onto:
    """The same with another stream."""
    return dataclasses.replace(onto, residual=residual)


def _run_flat(run, x: jax.Array, weights: Any, onto: Onto) -> Stream:
    """`run` with the leading dimensions folded into one."""
    shape = onto.residual.shape
    flat = _put(onto, onto.residual.reshape(-1, shape[-1]))
    return jax.tree.map(lambda y: y.reshape(shape), run(x.reshape(-1, x.shape[-1]), weights, flat))
