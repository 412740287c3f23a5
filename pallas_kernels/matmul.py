"""`quant_matmul`: one entry to every backend, and `explain`, which says what the choice would be.

The choice is made when the function is lowered, not when it is traced: one traced function runs the
XLA path on a CPU and lowers to the Triton kernel for a GPU, also for a GPU that is not there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import xla
from pallas_kernels.errors import BackendError, SpecError
from pallas_kernels.spec import QuantSpec
from pallas_kernels.weights import check_weights

BACKENDS = ("triton", "xla")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_X_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_TRITON_DTYPES = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which backend runs on a platform, and why."""

    backend: str
    reason: str


def explain(
    spec: QuantSpec, dtype, *, platform: str | None = None, backend: str | None = None
) -> Choice:
    """Say which backend `quant_matmul` runs for x of `dtype`.

    Args:
      spec: the weight's static facts.
      dtype: dtype of x.
      platform: "cpu", "cuda", "rocm" or "tpu"; None is the default device's.
      backend: what the caller asks for, as in `quant_matmul`.

    Raises:
      BackendError: if the named backend cannot serve this dtype or platform, or there is no such
        platform.
      SpecError: if no backend takes x of this dtype.
    """
    dtype = jnp.dtype(dtype)
    _check_activation(dtype)
    check_backend(backend, dtype)
    if platform is None:
        platform = _platform(jax.devices()[0])
    elif platform not in PLATFORMS:
        raise BackendError(f"platform must be None or one of {PLATFORMS}, got {platform!r}")
    if backend == "xla":
        return Choice("xla", "asked for by name")
    if backend == "triton":
        if platform == "cuda":
            return Choice("triton", "asked for by name")
        if platform == "cpu":
            return Choice("triton", "asked for by name; on cpu the kernel is interpreted, slowly")
        raise BackendError(
            f'backend "triton" runs on cuda, and interpreted on cpu, not on {platform}'
        )
    if platform != "cuda":
        return Choice("xla", f"the fused kernels need an NVIDIA GPU, this is {platform}")
    if dtype not in _TRITON_DTYPES:
        return Choice(
            "xla", f"the fused kernels multiply 16-bit activations, x is {jnp.dtype(dtype).name}"
        )
    return Choice("triton", f"fused {spec.bits}-bit kernel for 16-bit activations on cuda")


def check_backend(backend: str | None, dtype) -> None:
    """Raise a BackendError unless `backend` exists and serves x of `dtype`."""
    if backend is not None and backend not in BACKENDS:
        raise BackendError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
    if backend == "triton" and dtype not in _TRITON_DTYPES:
        raise BackendError(
            f'backend "triton" multiplies bfloat16 or float16 activations, x is '
            f'{jnp.dtype(dtype).name}: cast x, or use backend="xla"'
        )


def quant_matmul(
    x: jax.Array, weights: Mapping[str, jax.Array], spec: QuantSpec, *, backend: str | None = None
) -> jax.Array:
    """Compute x @ W.T + bias for a packed weight W[N, K].

    Differentiable in reverse mode with respect to x, scale and bias; the packed weight is what is
    kept for the backward pass, never its float expansion. To lower for a GPU that is absent, jax
    0.11 and later need `jax.sharding.use_abstract_mesh` with an abstract device around it.

    Args:
      x: [..., K] float32, bfloat16 or float16.
      weights: leaf dict of the weight (see `pallas_kernels.weights`), with an optional "bias".
      spec: the weight's static facts.
      backend: None for the best available, "triton" (on CPU: interpreted) or "xla". A name is that
        backend or an error.

    Returns:
      [..., N] in the dtype of x; sums are float32. `docs/numerics.md` states how the backends
      round.

    Raises:
      SpecError: if x or the arrays contradict the spec.
      BackendError: if the named backend cannot do it.
    """
    check_weights(weights, spec)
    x = jnp.asarray(x)
    _check_activation(x.dtype)
    if x.ndim < 1 or x.shape[-1] != spec.in_features:
        raise SpecError(f"x must be [..., {spec.in_features}], got {list(x.shape)}")
    check_backend(backend, x.dtype)
    weights = dict(weights)
    bias = weights.pop("bias", None)
    rows = x.reshape(-1, spec.in_features)
    if rows.shape[0]:
        y: jax.Array = _matmul(spec, backend, rows, weights)
    else:
        y = jnp.zeros((0, spec.out_features), x.dtype)
    if bias is not None:
        y = (y.astype(jnp.float32) + bias.astype(jnp.float32)[None, :]).astype(x.dtype)
    return y.reshape(*x.shape[:-1], spec.out_features)


def _check_activation(dtype) -> None:
    if dtype not in _X_DTYPES:
        raise SpecError(f"x must be float32, bfloat16 or float16, got {dtype}: cast it first")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(spec: QuantSpec, backend: str | None, x: jax.Array, weights: dict) -> jax.Array:
    by_xla = functools.partial(xla.matmul, spec=spec)
    if backend == "xla" or x.dtype not in _TRITON_DTYPES:
        return by_xla(x, weights)
    compiled = functools.partial(_by_triton, spec=spec, interpret=False)
    if backend is None:
        return lax.platform_dependent(x, weights, cuda=compiled, default=by_xla)
    interpreted = functools.partial(_by_triton, spec=spec, interpret=True)
    return lax.platform_dependent(x, weights, cuda=compiled, cpu=interpreted)


def _matmul_forward(spec, backend, x, weights):
    return _matmul(spec, backend, x, weights), (x, weights)


def _matmul_backward(spec, backend, residuals, y_bar):
    _, pull_back = jax.vjp(functools.partial(xla.matmul, spec=spec), *residuals)
    return pull_back(y_bar)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _by_triton(x: jax.Array, weights: dict, spec: QuantSpec, interpret: bool) -> jax.Array:
    # imported here, so that all else works where a later jax has no Pallas-Triton
    from pallas_kernels import triton

    packed, scale, zero_point = weights["packed"], weights["scale"], weights.get("zero_point")
    return triton.matmul(x, packed, scale, zero_point, spec, interpret=interpret)


def _platform(device: Any) -> str:
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
