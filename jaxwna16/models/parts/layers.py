"""The layers that models are made of, and `Linears`, which makes each quantized or plain."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxwna16.errors import ModelError
from jaxwna16.layers.dense import QuantDense
from jaxwna16.layers.fused import gated, project_onto
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.formulas.norms import Norm, Onto, apply_factor, apply_norm

Array = jax.Array

_NARROW = 64
"""Rows of x and features of a product that is no more than a reduction."""


class Dense(nnx.Module):
    """y = x W^T + b with W [N, K] as checkpoints store it; products are summed in float32.

    Attributes:
      backend: of what is fused with the product, as in `quant_matmul`; the product is XLA's.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        use_bias: bool,
        dtype,
        backend: str | None = None,
    ):
        self.weight = nnx.Param(jnp.zeros((out_features, in_features), dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, dtype)) if use_bias else None
        self.backend = backend

    def __call__(self, x: Array) -> Array:
        y = multiply(x, self.weight[...])
        if self.bias is not None:
            y = y + jnp.expand_dims(self.bias[...].astype(y.dtype), range(x.ndim - 1))
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of weight [V, hidden]; a token outside the vocabulary gives NaN.

    Attributes:
      multiplier: of the rows that are looked up, and not of the weight, which may be the head, too.
    """

    def __init__(self, vocab_size: int, features: int, *, dtype, multiplier: float = 1.0):
        self.features = features
        self.multiplier = multiplier
        self.weight = nnx.Param(jnp.zeros((vocab_size, features), dtype))

    def __call__(self, tokens: Array) -> Array:
        rows = self.weight[...].at[tokens].get(mode="fill", wrap_negative_indices=False)
        return apply_factor(rows, self.multiplier)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps), computed in float32, rounded, then times the weight."""

    kind = "rounded"
    start = 1.0

    def __init__(self, features: int, eps: float, *, dtype):
        self.weight = nnx.Param(jnp.full(features, self.start, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return apply_norm(x, self.norm)

    @property
    def norm(self) -> Norm:
        """What the kernels know it as."""
        return Norm(self.weight[...], self.eps, self.kind)


class OffsetRMSNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), computed in float32 and rounded once."""

    kind = "offset"
    start = 0.0


class LateRMSNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once."""

    kind = "wide"


class LayerNorm(RMSNorm):
    """(x - mean) / sqrt(variance + eps) * weight, computed in float32 and rounded once."""

    kind = "centered"


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(
        self,
        hidden: int,
        inner: int,
        bias: bool,
        linears: Linears,
        path: str,
        activation: str = "silu",
    ):
        self.gate_proj = linears.make(f"{path}.gate_proj", inner, hidden, bias)
        self.up_proj = linears.make(f"{path}.up_proj", inner, hidden, bias)
        self.down_proj = linears.make(f"{path}.down_proj", hidden, inner, bias)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return self.down_proj(self._run_inner(x))

    def _run_inner(self, x: Array) -> Array:
        return gated(x, self.gate_proj, self.up_proj, self.activation)

    def list_words(self) -> tuple[Array, ...]:
        """Packed words of the first products."""
        return list_words(self.gate_proj, self.up_proj)

    def run_onto(self, x: Array, onto: Onto) -> tuple[Array, Array | None]:
        """Add the result for x to a stream; see `project_onto`."""
        return project_onto(self._run_inner(x), self.down_proj, onto)


def list_words(*layers: Any) -> tuple[Array, ...]:
    """The packed words of those layers that have some."""
    return tuple(layer.packed[...] for layer in layers if isinstance(layer, QuantDense))


def matmul_precision(dtype: jax.typing.DTypeLike) -> lax.Precision:
    """HIGHEST for float32 (an accelerator would otherwise round its inputs), else the default."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def multiply(x: Array, weight: Array) -> Array:
    """x [..., K] times weight [N, K] transposed, float32 [..., N]."""
    if weight.shape[0] > _NARROW or x.size > _NARROW * x.shape[-1]:
        return _multiply_wide(x, weight)
    return lax.platform_dependent(x, weight, cuda=_multiply_narrow, default=_multiply_wide)


def _multiply_wide(x: Array, weight: Array) -> Array:
    return lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=matmul_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )


def _multiply_narrow(x: Array, weight: Array) -> Array:
    """The same as one reduction.

    Of several such products of one x, a GPU's XLA would copy the weights together at each call,
    multiply, and cut the result: five kernels in place of one.
    """
    wide = weight.astype(jnp.float32)
    return jnp.sum(
        x[..., None, :].astype(jnp.float32) * jnp.expand_dims(wide, range(x.ndim - 1)), -1
    )


class Linears:
    """Makes each linear by its path, quantized where `specs` says so, and checks the specs.

    Those named in `reordered` have a `perm` (act-order).
    """

    def __init__(
        self,
        specs: Mapping[str, QuantSpec],
        dtype: jnp.dtype,
        backend: str | None,
        reordered: Collection[str] = (),
    ):
        self.specs = specs
        self.reordered = reordered
        self.dtype = dtype
        self.backend = backend
        self.unused = set(specs)
        self.faults: list[str] = []

    def make(self, path: str, out_features: int, in_features: int, use_bias: bool):
        spec = self.find_spec(path, out_features, in_features)
        if spec is None:
            options = {"dtype": self.dtype, "backend": self.backend}
            return Dense(out_features, in_features, use_bias=use_bias, **options)
        return QuantDense(
            spec,
            use_bias=use_bias,
            act_order=path in self.reordered,
            dtype=self.dtype,
            backend=self.backend,
        )

    def find_spec(self, path: str, out_features: int, in_features: int) -> QuantSpec | None:
        """The spec of a module, if it is quantized; one of other sizes is noted as a fault."""
        if path not in self.specs:
            return None
        self.unused.remove(path)
        spec, expected = self.specs[path], (out_features, in_features)
        found = (spec.out_features, spec.in_features)
        if found == expected:
            return spec
        self.faults.append(f"{path}: expected [N, K] = {list(expected)}, found {list(found)}")
        return None

    def check_all_used(self, model: nnx.Module) -> None:
        """Raise `ModelError` if there is a fault, or a spec is of no module of the model.

        Modules that hold floats whatever their spec says (embeddings, routers) are no strays: what
        is packed there is expanded, see `jaxwna16.models.filling.expanded`.
        """
        held = {
            ".".join(map(str, path))
            for path, module in (nnx.iter_modules(model) if self.unused else ())
            if hasattr(module, "weight")
        }
        unused = self.unused - held
        strays = [f"{path}: no linear of this model can be quantized there" for path in unused]
        if self.faults or strays:
            raise ModelError("quantized modules do not fit the model", self.faults + sorted(strays))
