"""The leaf dict of one packed weight, and the one check that it fits its spec.

    packed      uint16 `spec.packed_shape`   the integers, see `pallas_kernels.format.layout`
    scale       float16 | bfloat16 | float32 `spec.scale_shape` = [G, N padded to 64]
    zero_point  int8 `spec.scale_shape`      signed; absent when symmetric
    bias        float [N]                    optional
    perm        int32 [K]                    optional (act-order): the product uses x[..., perm]

Padding (rows past N) is zero in every leaf. The leaves of stacked experts have one more axis in
front, of size E.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import FLOAT_DTYPES
from pallas_kernels.errors import SpecError
from pallas_kernels.format.spec import QuantSpec

SCALE_DTYPES = FLOAT_DTYPES


def make_abstract(
    spec: QuantSpec,
    scale_dtype,
    bias_dtype=None,
    *,
    act_order: bool = False,
    experts: int | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the leaf dict of `spec`.

    Args:
      spec: the weight.
      scale_dtype: of the scales.
      bias_dtype: of the bias; None for no bias.
      act_order: whether there is a `perm`.
      experts: E of stacked experts; None for one weight.
    """
    leaves = {
        "packed": jax.ShapeDtypeStruct(spec.packed_shape, jnp.uint16),
        "scale": jax.ShapeDtypeStruct(spec.scale_shape, scale_dtype),
    }
    if not spec.symmetric:
        leaves["zero_point"] = jax.ShapeDtypeStruct(spec.scale_shape, jnp.int8)
    if bias_dtype is not None:
        leaves["bias"] = jax.ShapeDtypeStruct((spec.out_features,), bias_dtype)
    if act_order:
        leaves["perm"] = jax.ShapeDtypeStruct((spec.in_features,), jnp.int32)
    if experts is None:
        return leaves
    return {
        name: jax.ShapeDtypeStruct((experts, *leaf.shape), leaf.dtype)
        for name, leaf in leaves.items()
    }


def check_weights(
    weights: Mapping[str, jax.Array], spec: QuantSpec, experts: int | None = None
) -> None:
    """Raise a SpecError that lists every way in which `weights` contradicts `spec`.

    With `experts`, the weights are a stack of that many.
    """
    if not isinstance(spec, QuantSpec):
        raise SpecError(f"spec must be a QuantSpec, got {type(spec).__name__}")
    if not isinstance(weights, Mapping):
        raise SpecError(
            f"weights must be the dict of arrays that pack() or load_checkpoint() gives, "
            f"got {type(weights).__name__}"
        )
    others = {
        name: type(leaf).__name__ for name, leaf in weights.items() if not hasattr(leaf, "dtype")
    }
    if others:
        raise SpecError(f"weights must be arrays, found {others}")
    scale, bias = weights.get("scale"), weights.get("bias")
    scale_dtype = jnp.float32 if scale is None else scale.dtype
    expected = make_abstract(
        spec,
        scale_dtype,
        None if bias is None else bias.dtype,
        act_order="perm" in weights,
        experts=experts,
    )
    faults = []
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            faults.append(f"{name} is missing")
        elif name not in expected:
            faults.append(f"{name} is not expected in {_describe(spec)} weight")
        elif weights[name].shape != expected[name].shape:
            faults.append(
                f"{name} has shape {list(weights[name].shape)}, "
                f"expected {list(expected[name].shape)}"
            )
        elif weights[name].dtype != expected[name].dtype:
            faults.append(f"{name} is {weights[name].dtype}, expected {expected[name].dtype}")
    if scale is not None and scale.dtype.name not in SCALE_DTYPES:
        faults.append(f"scale is {scale.dtype}, expected one of {', '.join(SCALE_DTYPES)}")
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        faults.append(f"bias is {bias.dtype}, expected a float dtype")
    if faults:
        raise SpecError(f"weights contradict {spec}: " + "; ".join(faults))


def _describe(spec: QuantSpec) -> str:
    return "a symmetric" if spec.symmetric else "an asymmetric"
