"""`QuantDense` for Flax Linen, the twin of the NNX layer over the same `quant_matmul`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels.matmul import quant_matmul
from pallas_kernels.spec import QuantSpec
from pallas_kernels.weights import make_abstract


class QuantDense(nn.Module):
    """y = x @ W.T + bias with a packed W[N, K].

    All leaves stand in the collection "params" under the names of the leaf dict, so the tree of a
    checkpoint serves as it is: `model.apply({"params": checkpoint.params}, x)`. `init` makes zeros.

    Attributes:
      spec: bits, groups, symmetry and sizes of the weight.
      use_bias: whether there is a bias [N].
      scale_dtype: dtype of the scales that `init` makes; loaded ones keep their own.
      bias_dtype: dtype of the bias that `init` makes; None is `dtype`, or `scale_dtype`.
      dtype: dtype that x is cast to, and of the result; None leaves x as it is.
      backend: None, "triton" or "xla", see `quant_matmul`.
    """

    spec: QuantSpec
    use_bias: bool = False
    scale_dtype: Any = jnp.bfloat16
    bias_dtype: Any = None
    dtype: Any = None
    backend: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Map x [..., K] to [..., N], constrained to `out_sharding` where that is given.

        Raises:
          SpecError, BackendError: as `quant_matmul`.
        """
        bias_dtype = (self.bias_dtype or self.dtype or self.scale_dtype) if self.use_bias else None
        shapes = make_abstract(self.spec, self.scale_dtype, bias_dtype)
        weights = {name: self._leaf(name, leaf) for name, leaf in shapes.items()}
        x = x if self.dtype is None else x.astype(self.dtype)
        y = quant_matmul(x, weights, self.spec, backend=self.backend)
        return y if out_sharding is None else jax.lax.with_sharding_constraint(y, out_sharding)

    def _leaf(self, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # Linen checks only the shape of a given leaf, so a loaded scale keeps its dtype
        return self.param(name, lambda _: jnp.zeros(leaf.shape, leaf.dtype))
