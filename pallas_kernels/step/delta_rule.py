"""A gated delta net from its input to what its output product takes.

On a GPU one new token a row is one kernel besides the products, which reads and writes the state
once.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from pallas_kernels.formulas.delta_net import DeltaCache, DeltaNet
from pallas_kernels.lowering import choose_at_lowering, has_symbolic
from pallas_kernels.step.linears import Linear, separate
from pallas_kernels.xla.delta_rule import mix


def project_and_update(
    x: jax.Array,
    linears: Sequence[Linear],
    net: DeltaNet,
    cache: DeltaCache,
    count: jax.Array,
    *,
    backend: str | None = None,
    prefer: str = "speed",
) -> tuple[jax.Array, DeltaCache]:
    """A gated delta net over a piece, but for the output product.

    Args:
      x: [B, S, K].
      linears: of qkv, z (the gate of the result), b (how much is written) and a (of the decay).
      net: the layer's other weights.
      cache: of the tokens before.
      count: int32 [B], how many tokens of each row are no padding.
      backend, prefer: as in `quant_matmul`.

    Returns:
      [B, S, Hv * Dv] in the dtype of x, and the cache with the piece.

    Raises:
      SpecError, BackendError, TableError: as `quant_matmul`.
    """
    arrays, call = separate(linears, backend, prefer)
    if x.shape[1] > 1 or has_symbolic(x.shape) or 0 in x.shape:
        return mix(call.multiply(x, arrays), net, cache, count)
    x = call.check(x, arrays)

    def by_xla(x, arrays, net, cache, count):
        return mix(call.multiply_by_xla(x, arrays), net, cache, count)

    def by_triton(x, arrays, net, cache, count, *, interpret):
        # imported here, so that all else works where a later jax has no Pallas-Triton
        from pallas_kernels.triton.step.delta_rule import step_delta_rule

        qkv, z, b, a = call.multiply_in_parts(x, arrays, interpret=interpret)
        y, inputs, state = step_delta_rule(
            qkv,
            z,
            b,
            a,
            conv_weight=net.conv_weight,
            inputs=cache.inputs,
            state=cache.state,
            A_log=net.A_log,
            dt_bias=net.dt_bias,
            norm_weight=net.norm_weight,
            norm_eps=net.norm_eps,
            active=count,
            key_heads=net.key_heads,
            interpret=interpret,
        )
        return y[:, None], DeltaCache(inputs, state)

    run = choose_at_lowering(by_xla, by_triton, backend, x.dtype)
    return run(x, arrays, net, cache, count)
