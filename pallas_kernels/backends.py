"""Which backend runs: their names, what each can do, and `explain`, which reports the choice."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import check_float_dtype, read_count
from pallas_kernels.errors import BackendError, SpecError
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.tiles.dense_rules import choose, describe
from pallas_kernels.tiles.device import UNKNOWN, find_device

BACKENDS = ("triton", "xla")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
TRITON_DTYPES = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend that runs on a platform, and the reason.

    `schedule` describes the tiles of the Triton kernel. It is None for XLA, and if the number of
    tokens is not given.
    """

    backend: str
    reason: str
    schedule: str | None = None


def explain(
    spec: QuantSpec,
    dtype,
    *,
    platform: str | None = None,
    backend: str | None = None,
    tokens: int | None = None,
    scale_dtype=None,
) -> Choice:
    """Say which backend `quant_matmul` runs for x of `dtype`.

    Args:
      spec: the weight's static facts.
      dtype: dtype of x.
      platform: "cpu", "cuda", "rocm" or "tpu"; None is the default device's.
      backend: what the caller asks for, as in `quant_matmul`.
      tokens: M, the rows of x. If it is given and not 0, the choice includes the schedule.
      scale_dtype: dtype of the scales; None means that of x.

    Raises:
      BackendError: if the named backend cannot serve this dtype or platform, or the platform is
        unknown.
      SpecError: if no backend takes x or scales of this dtype, `spec` is not a QuantSpec, or
        `tokens` is not an integer of at least 0.

    Example:
      ```python
      spec = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=False, in_features=64, out_features=128
      )
      choice = jaxwna16.explain(spec, jnp.bfloat16, platform="cpu")
      assert choice.backend == "xla"
      print(choice.reason)
      ```
    """
    if not isinstance(spec, QuantSpec):
        raise SpecError(f"spec must be a QuantSpec, got {type(spec).__name__}")
    dtype = check_float_dtype("x", dtype)
    scale_dtype = dtype if scale_dtype is None else check_float_dtype("scale_dtype", scale_dtype)
    tokens = None if tokens is None else read_count("tokens", tokens)
    check_backend(backend, dtype)
    if platform is None:
        platform = _platform(jax.devices()[0])
    elif platform not in PLATFORMS:
        raise BackendError(f"platform must be None or one of {PLATFORMS}, got {platform!r}")
    choice = _choose_backend(spec, dtype, platform, backend)
    if choice.backend == "xla" or not tokens:
        return choice
    device = find_device() if platform == "cuda" else UNKNOWN
    schedule = choose(spec, tokens, dtype, scale_dtype, device)
    return dataclasses.replace(choice, schedule=describe(schedule, tokens))


def _choose_backend(spec: QuantSpec, dtype, platform: str, backend: str | None) -> Choice:
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
    if dtype not in TRITON_DTYPES:
        return Choice("xla", f"the fused kernels multiply 16-bit activations, x is {dtype.name}")
    return Choice("triton", f"fused {spec.bits}-bit kernel for 16-bit activations on cuda")


def check_backend(backend: str | None, dtype=None) -> None:
    """Raise a BackendError unless `backend` exists and serves x of `dtype`; None for no x."""
    if backend is not None and backend not in BACKENDS:
        raise BackendError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
    dtype = None if dtype is None else jnp.dtype(dtype)
    if backend == "triton" and dtype is not None and dtype not in TRITON_DTYPES:
        raise BackendError(
            f'backend "triton" multiplies bfloat16 or float16 activations, x is '
            f'{dtype.name}: cast x, or use backend="xla"'
        )


def _platform(device: Any) -> str:
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
