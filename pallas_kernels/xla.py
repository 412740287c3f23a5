"""The XLA path: expand one weight inside the call, then one dot. Runs wherever JAX runs."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dequantize import expand
from pallas_kernels.spec import QuantSpec


def matmul(x: jax.Array, weights: Mapping[str, jax.Array], spec: QuantSpec) -> jax.Array:
    """Compute x @ W.T for x [M, K] -> [M, N] in x's dtype, accumulated in float32.

    W is rounded to the scale's dtype as compressed-tensors does, then to x's dtype. The barrier ties
    the weight to x: without it XLA lifts the expansion out of a decode loop, and every float weight
    of the model would live as long as the loop.
    """
    x, packed = lax.optimization_barrier((x, dict(weights)))
    w = expand(packed, spec).astype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract_k = (((1,), (1,)), ((), ()))
    y = lax.dot_general(x, w, contract_k, precision=precision, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
