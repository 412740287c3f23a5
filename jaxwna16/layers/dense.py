"""`QuantDense` for Flax NNX: a linear layer whose kernel is a packed weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.arguments import check_float_dtype, convert_array
from pallas_kernels.backends import check_backend
from pallas_kernels.errors import SpecError
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import check_weights, make_abstract
from pallas_kernels.matmul import quant_matmul
from pallas_kernels.tiles.dense_rules import check_prefer

_LEAVES = ("packed", "scale", "zero_point", "bias", "perm")


class QuantParam(nnx.Variable):
    """An integer leaf of a packed weight. It is no `nnx.Param`: optimizers and `nnx.grad` skip it.

    Example:
      ```python
      spec = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=False, in_features=64, out_features=128
      )
      layer = jaxwna16.QuantDense(spec)
      assert set(nnx.state(layer, jaxwna16.QuantParam)) == {"packed", "zero_point"}
      assert set(nnx.state(layer, nnx.Param)) == {"scale"}
      ```
    """


class QuantDense(nnx.Module):
    """y = x @ W.T + bias with a packed W[N, K], W = (q - zero_point) * scale.

    The weights start at zero and come from a checkpoint, by path or through `from_weights`. Under
    `nnx.eval_shape` no array is made.

    Attributes:
      packed: `QuantParam` uint16 `spec.packed_shape`.
      scale: `nnx.Param` `spec.scale_shape`.
      zero_point: `QuantParam` int8 `spec.scale_shape`, None when symmetric.
      bias: `nnx.Param` [N], None without bias.
      perm: `QuantParam` int32 [K], starts as 0 .. K-1; None without act-order.

    Example:
      ```python
      spec = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=False, in_features=64, out_features=128
      )
      packed = jaxwna16.quantize(jax.random.normal(jax.random.key(0), (128, 64)), spec)
      layer = jaxwna16.QuantDense.from_weights(packed, spec)
      y = layer(jnp.ones((3, 64), jnp.bfloat16))
      assert y.shape == (3, 128)
      ```
    """

    def __init__(
        self,
        spec: QuantSpec,
        *,
        use_bias: bool = False,
        act_order: bool = False,
        scale_dtype: Any = jnp.bfloat16,
        bias_dtype: Any = None,
        dtype: Any = None,
        backend: str | None = None,
        prefer: str = "speed",
        kernel_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        """Make the layer with zero weights.

        Args:
          spec: bits, groups, symmetry and sizes of the weight.
          use_bias: whether there is a bias [N].
          act_order: whether the weight's input features were reordered. The layer then has a `perm`
            and uses x[..., perm].
          scale_dtype: dtype of the scales: float16, bfloat16 or float32.
          bias_dtype: dtype of the bias; None is `dtype`, or `scale_dtype` where that is None.
          dtype: dtype that x is cast to, and of the result; None leaves x as it is.
          backend: None, "triton" or "xla", see `quant_matmul`.
          prefer: "speed" or "memory", see `quant_matmul`.
          kernel_metadata: metadata of `packed`, `scale` and `zero_point`, for instance sharding
            names.
          rngs: not used; accepted so that the layer can replace an `nnx.Linear`.

        Raises:
          SpecError, BackendError: if the values are impossible.
        """
        del rngs
        check_options(spec, backend, prefer, dtype, scale_dtype, bias_dtype)
        self.spec, self.dtype, self.backend, self.prefer = spec, dtype, backend, prefer
        bias_dtype = choose_bias_dtype(use_bias, bias_dtype, dtype, scale_dtype)
        shapes = make_abstract(spec, scale_dtype, bias_dtype, act_order=act_order)
        starts = {name: make_start(name, leaf) for name, leaf in shapes.items()}
        metadata = dict(kernel_metadata or {})
        self.packed = QuantParam(starts["packed"], **metadata)
        self.scale = nnx.Param(starts["scale"], **metadata)
        self.zero_point = None if spec.symmetric else QuantParam(starts["zero_point"], **metadata)
        self.bias = nnx.Param(starts["bias"]) if use_bias else None
        self.perm = QuantParam(starts["perm"]) if act_order else None

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, jax.Array], spec: QuantSpec, **options
    ) -> QuantDense:
        """Make the layer that holds `weights`, a leaf dict; "bias" and "perm" may be in it.

        Raises:
          SpecError: if the arrays contradict the spec.
        """
        check_weights(weights, spec)
        options |= {"use_bias": "bias" in weights, "act_order": "perm" in weights}
        layer = nnx.eval_shape(lambda: cls(spec, **options))
        for name, array in weights.items():
            getattr(layer, name).set_value(jnp.asarray(array))
        return layer

    @property
    def weights(self) -> dict[str, jax.Array]:
        """The leaf dict, as `quant_matmul` and its fused forms take it."""
        leaves = {name: getattr(self, name) for name in _LEAVES}
        return {name: leaf.get_value() for name, leaf in leaves.items() if leaf is not None}

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Map x [..., K] to [..., N], constrained to `out_sharding` where that is given."""
        x = cast_input(x, self.dtype)
        y = quant_matmul(x, self.weights, self.spec, backend=self.backend, prefer=self.prefer)
        return constrain(y, out_sharding)


def check_options(
    spec: QuantSpec,
    backend: str | None,
    prefer: str,
    dtype: Any,
    scale_dtype: Any,
    bias_dtype: Any,
) -> None:
    """Raise a SpecError or BackendError if no layer can have these options."""
    if not isinstance(spec, QuantSpec):
        raise SpecError(f"QuantDense takes a QuantSpec, got {type(spec).__name__}")
    check_float_dtype("scale_dtype", scale_dtype)
    for name, value in (("dtype", dtype), ("bias_dtype", bias_dtype)):
        if value is not None:
            check_float_dtype(name, value)
    # without a dtype any backend may be possible: only the call knows the dtype of x
    check_backend(backend, jnp.dtype(jnp.bfloat16 if dtype is None else dtype))
    check_prefer(prefer)


def choose_bias_dtype(use_bias: bool, bias_dtype: Any, dtype: Any, scale_dtype: Any) -> Any:
    """The dtype of a layer's bias, None without: the first of these that is given."""
    return (bias_dtype or dtype or scale_dtype) if use_bias else None


def make_start(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """What a leaf holds before weights come: zeros, and no reordering."""
    if name == "perm":
        return jnp.arange(leaf.shape[0], dtype=leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype)


def cast_input(x: jax.Array, dtype: Any) -> jax.Array:
    """x as an array in `dtype`, or in its own dtype if that is None."""
    x = convert_array("x", x)
    return x if dtype is None else x.astype(dtype)


def constrain(y: jax.Array, out_sharding: Any) -> jax.Array:
    """y, constrained to a sharding where one is given."""
    return y if out_sharding is None else jax.lax.with_sharding_constraint(y, out_sharding)
