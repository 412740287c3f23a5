"""The layers for Flax Linen, twins of the NNX layers over the same functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxwna16.layers.dense import cast_input, check_options, choose_bias_dtype, constrain
from jaxwna16.layers.linen_moe import QuantMoE as QuantMoE
from jaxwna16.layers.linen_moe import declare_leaves
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import make_abstract
from pallas_kernels.matmul import quant_matmul


class QuantDense(nn.Module):
    """y = x @ W.T + bias with a packed W[N, K].

    All leaves are in the collection "params" under the names of the leaf dict, so the tree of a
    checkpoint can be used directly: `model.apply({"params": checkpoint.params}, x)`. `init` makes
    zeros, and a `perm` that reorders nothing.

    Attributes:
      spec: bits, groups, symmetry and sizes of the weight.
      use_bias: whether there is a bias [N].
      act_order: whether the weight's input features were reordered. The layer then has a `perm`
        int32 [K] and uses x[..., perm].
      scale_dtype: dtype of the scales that `init` makes; loaded ones keep their own.
      bias_dtype: dtype of the bias that `init` makes; None is `dtype`, or `scale_dtype`.
      dtype: dtype that x is cast to, and of the result; None leaves x as it is.
      backend: None, "triton" or "xla", see `quant_matmul`.
      prefer: "speed" or "memory", see `quant_matmul`.

    Raises:
      SpecError, BackendError: if the values are impossible.

    Example:
      ```python
      spec = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=False, in_features=64, out_features=128
      )
      packed = jaxwna16.quantize(jax.random.normal(jax.random.key(0), (128, 64)), spec)
      layer = jaxwna16.linen.QuantDense(spec)
      y = layer.apply({"params": packed}, jnp.ones((3, 64), jnp.bfloat16))
      assert y.shape == (3, 128)
      ```
    """

    spec: QuantSpec
    use_bias: bool = False
    act_order: bool = False
    scale_dtype: Any = jnp.bfloat16
    bias_dtype: Any = None
    dtype: Any = None
    backend: str | None = None
    prefer: str = "speed"

    def __post_init__(self):
        dtypes = self.dtype, self.scale_dtype, self.bias_dtype
        check_options(self.spec, self.backend, self.prefer, *dtypes)
        super().__post_init__()

    def setup(self):
        dtypes = self.bias_dtype, self.dtype, self.scale_dtype
        bias_dtype = choose_bias_dtype(self.use_bias, *dtypes)
        shapes = make_abstract(self.spec, self.scale_dtype, bias_dtype, act_order=self.act_order)
        self.leaves = declare_leaves(self, shapes)

    @property
    def weights(self) -> dict[str, jax.Array]:
        """The leaf dict, as `quant_matmul` and its fused forms take it."""
        return dict(self.leaves)

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Map x [..., K] to [..., N], constrained to `out_sharding` where that is given.

        Raises:
          SpecError, BackendError: as `quant_matmul`.
        """
        x = cast_input(x, self.dtype)
        y = quant_matmul(x, self.weights, self.spec, backend=self.backend, prefer=self.prefer)
        return constrain(y, out_sharding)
