"""Layers that share their input as one call: q/k/v, and gate/up of an MLP.

Both functions take layers of NNX and of Linen; a Linen layer is called within its parent, as any
submodule is:

    class MLP(nn.Module):
        spec: QuantSpec

        @nn.compact
        def __call__(self, x):
            gate, up = (QuantDense(self.spec, name=name) for name in ("gate_proj", "up_proj"))
            return gated(x, gate, up)

Without layers, `quant_matmul_many` and `quant_matmul_gated` do the same with leaf dicts
(`params["gate_proj"]`) and specs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxwna16.layers import linen
from jaxwna16.layers.dense import QuantDense, cast_input
from pallas_kernels.formulas.activations import apply, check
from pallas_kernels.formulas.norms import Onto
from pallas_kernels.matmul import quant_matmul_gated, quant_matmul_many
from pallas_kernels.step.linears import Linear
from pallas_kernels.step.residual import add_onto, multiply_onto

Layer = Callable[[jax.Array], jax.Array]


def project(x: jax.Array, layers: Sequence[Layer]) -> tuple[jax.Array, ...]:
    """Compute `layer(x)` for each layer.

    All `QuantDense` layers with the same dtype, backend and prefer run as one `quant_matmul_many`,
    whatever their specs. Other layers, also subclasses of `QuantDense`, are called one by one.

    Args:
      x: [..., K].
      layers: functions of x.

    Returns:
      [..., N_i] for each layer, in their order.

    Raises:
      SpecError, BackendError, TableError: as `quant_matmul`.

    Example:
      ```python
      spec = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=False, in_features=64, out_features=128
      )
      packed = jaxwna16.quantize(jax.random.normal(jax.random.key(0), (128, 64)), spec)
      layer = jaxwna16.QuantDense.from_weights(packed, spec)
      q, k = jaxwna16.project(jnp.ones((3, 64), jnp.bfloat16), [layer, layer])
      assert q.shape == k.shape == (3, 128)
      ```
    """
    calls: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        calls.setdefault(_find_settings(layer) or i, []).append(i)
    results: dict[int, jax.Array] = {}
    for settings, members in calls.items():
        if isinstance(settings, int):
            ys = (layers[settings](x),)
        else:
            dtype, backend, prefer = settings
            alike: list[Any] = [layers[i] for i in members]
            ys = quant_matmul_many(
                cast_input(x, dtype),
                [layer.weights for layer in alike],
                [layer.spec for layer in alike],
                backend=backend,
                prefer=prefer,
            )
        results.update(zip(members, ys, strict=True))
    return tuple(results[i] for i in range(len(layers)))


def gated(x: jax.Array, gate: Layer, up: Layer, activation: str = "silu") -> jax.Array:
    """Compute act(gate(x)) * up(x).

    Two `QuantDense` layers with the same dtype, backend and prefer run as one `quant_matmul_gated`.
    In 16-bit dtypes it rounds less often: in most cases once, at the end. Other layers are called
    one by one.

    Args:
      x: [..., K].
      gate, up: functions of x with results of the same shape.
      activation: as in `quant_matmul_gated`.

    Returns:
      [..., N].

    Raises:
      SpecError, BackendError, TableError: as `quant_matmul`.

    Example:
      ```python
      spec = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=False, in_features=64, out_features=128
      )
      packed = jaxwna16.quantize(jax.random.normal(jax.random.key(0), (128, 64)), spec)
      layer = jaxwna16.QuantDense.from_weights(packed, spec)
      y = jaxwna16.gated(jnp.ones((3, 64), jnp.bfloat16), layer, layer)
      assert y.shape == (3, 128)
      ```
    """
    settings = _find_settings(gate)
    if settings is None or settings != _find_settings(up):
        y = gate(x)
        if activation == "swigluoai":  # it is no factor of up
            return apply(activation, y.astype(jnp.float32), up(x).astype(jnp.float32)).astype(
                y.dtype
            )
        check(activation, gated=True)
        # a sigmoid in 16 bits would be rounded, and then the product with it
        return apply(activation, y.astype(jnp.float32)).astype(y.dtype) * up(x)
    dtype, backend, prefer = settings
    first: Any = gate
    second: Any = up
    return quant_matmul_gated(
        cast_input(x, dtype),
        first.weights,
        second.weights,
        first.spec,
        second.spec,
        activation=activation,
        backend=backend,
        prefer=prefer,
    )


def project_onto(x: jax.Array, layer: Layer, onto: Onto) -> tuple[jax.Array, jax.Array | None]:
    """Add `layer(x)` to a residual stream, with the norms there (`pallas_kernels.formulas.norms`).

    Args:
      x: [..., K].
      layer: a function of x.
      onto: the stream [..., N] and its norms.

    Returns:
      The stream and its early norm (None without one), [..., N] both.

    Raises:
      SpecError, BackendError, TableError: as `quant_matmul`.
    """
    settings = _find_settings(layer)
    packed: Any = layer
    if settings is None or settings[0] not in (None, x.dtype):
        return add_onto(layer(x), onto, backend=getattr(layer, "backend", None))
    _, backend, prefer = settings
    return multiply_onto(x, packed.weights, packed.spec, onto, backend=backend, prefer=prefer)


def gather(x: jax.Array, layers: Sequence[Layer]) -> tuple[list[Linear], str | None, str]:
    """The layers of x as `pallas_kernels.step` takes them, with backend and prefer.

    Those that cannot be one call with what follows are computed here.
    """
    settings = [_find_settings(layer) for layer in layers]
    shared = set(settings) - {None}
    [alike] = shared if len(shared) == 1 else [None]
    if alike is None or alike[0] not in (None, x.dtype):
        backend = next(
            (b for b in (getattr(layer, "backend", None) for layer in layers) if b), None
        )
        return list(project(x, layers)), backend, "speed"
    packed: list[Any] = list(layers)
    linears = [
        layer(x) if found is None else (layer.weights, layer.spec)
        for layer, found in zip(packed, settings, strict=True)
    ]
    return linears, *alike[1:]


def _find_settings(layer: Any) -> tuple[Any, str | None, str] | None:
    """What layers must share to be one call; None if this one must be called by itself."""
    # a subclass may compute something else in its __call__
    if type(layer) not in (QuantDense, linen.QuantDense):
        return None
    dtype = None if layer.dtype is None else jnp.dtype(layer.dtype)
    return dtype, layer.backend, layer.prefer
