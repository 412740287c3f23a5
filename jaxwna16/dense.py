"""`QuantDense` for Flax NNX: a linear layer whose kernel is a packed weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.errors import SpecError
from pallas_kernels.matmul import check_backend, quant_matmul
from pallas_kernels.spec import QuantSpec
from pallas_kernels.weights import check_weights, make_abstract


class QuantParam(nnx.Variable):
    """An integer leaf of a packed weight: no `nnx.Param`, so optimizers and `nnx.grad` skip it."""


class QuantDense(nnx.Module):
    """y = x @ W.T + bias with a packed W[N, K], W = (q - zero_point) * scale.

    The weights start at zero and come from a checkpoint, by path or through `from_weights`. Under
    `nnx.eval_shape` no array is made.

    Attributes:
      packed: `QuantParam` uint16 `spec.packed_shape`.
      scale: `nnx.Param` `spec.scale_shape`.
      zero_point: `QuantParam` int8 `spec.scale_shape`, None when symmetric.
      bias: `nnx.Param` [N], None without bias.
    """

    def __init__(
        self,
        spec: QuantSpec,
        *,
        use_bias: bool = False,
        scale_dtype: Any = jnp.bfloat16,
        bias_dtype: Any = None,
        dtype: Any = None,
        backend: str | None = None,
        kernel_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        """Make the layer with zero weights.

        Args:
          spec: bits, groups, symmetry and sizes of the weight.
          use_bias: whether there is a bias [N].
          scale_dtype: dtype of the scales: float16, bfloat16 or float32.
          bias_dtype: dtype of the bias; None is `dtype`, or `scale_dtype` where that is None.
          dtype: dtype that x is cast to, and of the result; None leaves x as it is.
          backend: None, "triton" or "xla", see `quant_matmul`.
          kernel_metadata: metadata of `packed`, `scale` and `zero_point`, for instance sharding
            names.
          rngs: not used; taken so that the layer can stand where `nnx.Linear` stood.

        Raises:
          SpecError, BackendError: if the values are impossible.
        """
        del rngs
        if not isinstance(spec, QuantSpec):
            raise SpecError(f"QuantDense takes a QuantSpec, got {type(spec).__name__}")
        check_backend(backend, dtype)
        self.spec, self.dtype, self.backend = spec, dtype, backend
        shapes = make_abstract(
            spec, scale_dtype, (bias_dtype or dtype or scale_dtype) if use_bias else None
        )
        zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
        metadata = dict(kernel_metadata or {})
        self.packed = QuantParam(zeros["packed"], **metadata)
        self.scale = nnx.Param(zeros["scale"], **metadata)
        self.zero_point = None if spec.symmetric else QuantParam(zeros["zero_point"], **metadata)
        self.bias = nnx.Param(zeros["bias"]) if use_bias else None

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, jax.Array], spec: QuantSpec, **options
    ) -> QuantDense:
        """Make the layer that holds `weights` (a leaf dict; with "bias", the layer has one).

        Raises:
          SpecError: if the arrays contradict the spec.
        """
        check_weights(weights, spec)
        make = lambda: cls(spec, use_bias="bias" in weights, **options)  # noqa: E731
        layer = nnx.eval_shape(make)
        for name, array in weights.items():
            getattr(layer, name).set_value(jnp.asarray(array))
        return layer

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Map x [..., K] to [..., N], constrained to `out_sharding` where that is given."""
        leaves = {
            "packed": self.packed,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "bias": self.bias,
        }
        weights = {name: leaf.get_value() for name, leaf in leaves.items() if leaf is not None}
        x = x if self.dtype is None else x.astype(self.dtype)
        y = quant_matmul(x, weights, self.spec, backend=self.backend)
        return y if out_sharding is None else jax.lax.with_sharding_constraint(y, out_sharding)
