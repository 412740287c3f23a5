"""`quant_matmul` and its fused forms: one entry to every backend."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import check_float_dtype, convert_array
from pallas_kernels.backends import check_backend
from pallas_kernels.errors import SpecError
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import check_weights
from pallas_kernels.formulas import activations
from pallas_kernels.lowering import choose_at_lowering, has_symbolic, refuse_at_lowering
from pallas_kernels.tiles.dense_rules import check_prefer
from pallas_kernels.vmap_rule import fold_vmap
from pallas_kernels.xla.dense import matmul

Weights = Mapping[str, jax.Array]
_SYMBOLIC = (
    "a GPU kernel needs a known number of tokens, got x {shape}: export the function once for each "
    'number of tokens, or for cpu alone, or with backend="xla"'
)


def quant_matmul(
    x: jax.Array,
    weights: Weights,
    spec: QuantSpec,
    *,
    backend: str | None = None,
    prefer: str = "speed",
) -> jax.Array:
    """Compute x @ W.T + bias for a packed weight W[N, K].

    Differentiable with respect to x, scale and bias, in both modes and to any order. The backward
    pass keeps the packed weight, never its floats. To lower for a GPU that is absent, jax 0.11 and
    later need `jax.sharding.use_abstract_mesh` with an abstract device around the call.

    Args:
      x: [..., K] float32, bfloat16 or float16.
      weights: leaf dict of the weight (see `pallas_kernels.format.weights`), with an optional
        "bias", and "perm" where the input features were reordered (act-order).
      spec: the weight's static facts.
      backend: None for the best available, "triton" (on CPU: interpreted) or "xla". A named backend
        that cannot run is an error; no other takes its place.
      prefer: "speed", or "memory", which never expands the weight. On a GPU, expanding is faster
        from about a thousand tokens on. The expanded weight has 2 bytes for each element, and is
        freed after the product.

    Returns:
      [..., N] in the dtype of x; sums are float32. `docs/numerics.md` states how the backends
      round.

    Raises:
      SpecError: if x or the arrays contradict the spec.
      BackendError: if the named backend cannot do it, or the number of tokens is symbolic (in
        `jax.export`) where a GPU kernel is lowered.
      TableError: if this GPU has a table of tuned tiles that cannot be used.

    Example:
      ```python
      spec = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=False, in_features=64, out_features=128
      )
      packed = jaxwna16.quantize(jax.random.normal(jax.random.key(0), (128, 64)), spec)
      y = jaxwna16.quant_matmul(jnp.ones((3, 64), jnp.bfloat16), packed, spec)
      assert y.shape == (3, 128)
      ```
    """
    [y] = quant_matmul_many(x, [weights], [spec], backend=backend, prefer=prefer)
    return y


def quant_matmul_many(
    x: jax.Array,
    weights: Sequence[Weights],
    specs: Sequence[QuantSpec],
    *,
    backend: str | None = None,
    prefer: str = "speed",
) -> tuple[jax.Array, ...]:
    """Compute `quant_matmul` for each of several weights that share x, as q, k and v do.

    On a GPU, weights whose specs differ only in N run as one kernel.

    Args:
      x: [..., K].
      weights: their leaf dicts.
      specs: their specs, in the same order.
      backend, prefer: as in `quant_matmul`.

    Returns:
      [..., N_i] for each weight.

    Raises:
      SpecError, BackendError, TableError: as `quant_matmul`.

    Example:
      ```python
      spec = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=False, in_features=64, out_features=128
      )
      packed = jaxwna16.quantize(jax.random.normal(jax.random.key(0), (128, 64)), spec)
      x = jnp.ones((3, 64), jnp.bfloat16)
      q, k = jaxwna16.quant_matmul_many(x, [packed, packed], [spec, spec])
      assert q.shape == k.shape == (3, 128)
      ```
    """
    x = check_call(x, weights, specs, backend, prefer)
    call = _Call(tuple(specs), backend, prefer)
    return tuple(_run(call, x, weights))


def quant_matmul_gated(
    x: jax.Array,
    gate: Weights,
    up: Weights,
    gate_spec: QuantSpec,
    up_spec: QuantSpec,
    *,
    activation: str = "silu",
    backend: str | None = None,
    prefer: str = "speed",
) -> jax.Array:
    """Compute act(x @ Wg.T + bg) * (x @ Wu.T + bu), rounded once, at the end.

    On a GPU this is one kernel, unless the specs differ, a weight has "perm" or the activation is
    "gelu" (Pallas has no error function). In these cases, and where a weight is expanded, both
    products are rounded to the dtype of x before the activation.

    Args:
      x: [..., K].
      gate, up: leaf dicts of Wg and Wu.
      gate_spec, up_spec: their specs, with the same K and N.
      activation: "silu", "gelu", "gelu_tanh", "relu2" or "swigluoai", see
        `pallas_kernels.formulas.activations`.
      backend, prefer: as in `quant_matmul`.

    Returns:
      [..., N] in the dtype of x.

    Raises:
      SpecError, BackendError, TableError: as `quant_matmul`.

    Example:
      ```python
      spec = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=False, in_features=64, out_features=128
      )
      packed = jaxwna16.quantize(jax.random.normal(jax.random.key(0), (128, 64)), spec)
      x = jnp.ones((3, 64), jnp.bfloat16)
      y = jaxwna16.quant_matmul_gated(x, packed, packed, spec, spec)
      assert y.shape == (3, 128)
      ```
    """
    weights, specs = [gate, up], [gate_spec, up_spec]
    x = check_call(x, weights, specs, backend, prefer)
    activations.check(activation, gated=True)
    if gate_spec.out_features != up_spec.out_features:
        raise SpecError(
            f"gate and up must have the same N, got {gate_spec.out_features} and "
            f"{up_spec.out_features}"
        )
    reordered = "perm" in gate or "perm" in up
    if gate_spec != up_spec or gate["scale"].dtype != up["scale"].dtype or reordered:
        g, u = quant_matmul_many(x, weights, specs, backend=backend, prefer=prefer)
        y = activations.apply(activation, g.astype(jnp.float32), u.astype(jnp.float32))
        return y.astype(x.dtype)
    [y] = _run(_Call((gate_spec, up_spec), backend, prefer, activation), x, weights)
    return y


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static facts of one call.

    Attributes:
      activation: of gate and up; None of products that stay apart.
    """

    specs: tuple[QuantSpec, ...]
    backend: str | None
    prefer: str
    activation: str | None = None


def check_call(x, weights, specs, backend, prefer) -> jax.Array:
    """x as an array; raise a SpecError or BackendError if the arguments contradict each other."""
    if len(weights) != len(specs):
        raise SpecError(f"each weight needs a spec, got {len(weights)} weights, {len(specs)} specs")
    for weight, spec in zip(weights, specs, strict=True):
        check_weights(weight, spec)
    x = convert_array("x", x)
    check_float_dtype("x", x.dtype)
    for spec in specs:
        if x.ndim < 1 or x.shape[-1] != spec.in_features:
            raise SpecError(f"x must be [..., {spec.in_features}], got {list(x.shape)}")
    check_backend(backend, x.dtype)
    check_prefer(prefer)
    return x


def _run(call: _Call, x: jax.Array, weights: Sequence[Weights]) -> list[jax.Array]:
    """Fold the leading dimensions of x, multiply."""
    lead, rows = x.shape[:-1], x.reshape(-1, x.shape[-1])
    if rows.shape[0]:
        by_xla = functools.partial(_multiply_by_xla, call)
        by_triton = functools.partial(_multiply_by_triton, call)
        plain = [dict(leaves) for leaves in weights]
        ys: Any = choose_at_lowering(by_xla, by_triton, call.backend, x.dtype)(rows, plain)
    else:
        specs = call.specs if call.activation is None else call.specs[:1]
        ys = [jnp.zeros((0, spec.out_features), x.dtype) for spec in specs]
    return [y.reshape(*lead, y.shape[-1]) for y in ys]


def _multiply_by_xla(call: _Call, x: jax.Array, weights: list) -> list[jax.Array]:
    ys = [matmul(x, w, spec) for w, spec in zip(weights, call.specs, strict=True)]
    if call.activation is not None:
        ys = [activations.apply(call.activation, *ys)]
    return [y.astype(x.dtype) for y in ys]


def _multiply_by_triton(call: _Call, x: jax.Array, weights: list, *, interpret: bool) -> list:
    # imported here, so that all else works where a later jax has no Pallas-Triton
    from pallas_kernels.triton.parts import finish
    from pallas_kernels.triton.products import multiply_alike, multiply_each

    if has_symbolic(x.shape):
        refused = refuse_at_lowering(_SYMBOLIC.format(shape=list(x.shape))).astype(x.dtype)
        ys = jax.eval_shape(functools.partial(_multiply_by_xla, call), x, weights)
        return [jnp.full(y.shape, refused) for y in ys]

    def run(x, weights):
        options = {"prefer": call.prefer, "interpret": interpret}
        if call.activation is None:
            parts = multiply_each(x, weights, call.specs, **options)
        else:
            options["activation"] = call.activation
            parts = multiply_alike(x, weights, call.specs, **options)
        return finish(parts, x.dtype, call.activation)

    return fold_vmap(run)(x, weights)
