"""Float weight -> packed weight, rounding each value to the nearest integer (RTN)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.arguments import check_float_dtype, convert_array
from pallas_kernels.errors import SpecError
from pallas_kernels.format.layout import tiles_from_codes
from pallas_kernels.format.spec import TILE_N, QuantSpec


def quantize(w: jax.Array, spec: QuantSpec, *, scale_dtype=jnp.bfloat16) -> dict[str, jax.Array]:
    """Quantize W[N, K] to the nearest integers, with scales from the range of each group.

    The formulas are those of compressed-tensors (`quantization/utils/helpers.py`,
    `calculate_qparams`, and `forward_helpers.py`, `_quantize`) with `scale_dtype` set, in float32.
    It checks the numbers, so it does not run under `jax.jit`, `jax.vmap` or `jax.eval_shape`.
    With a = 2^bits - 1 and lo = -2^(bits-1), over each group widened to hold 0:

        symmetric:   scale = max |w| / (a / 2),       q = round(w / scale)
        asymmetric:  scale = (max w - min w) / a,     zero_point = round(lo - min w / scale),
                     q = round(w / scale + zero_point)

    scale is rounded to `scale_dtype` before q is computed, and q is clamped to [lo, lo + a].

    Args:
      w: [N, K] floats, finite; or [E, N, K], experts that are quantized one by one.
      spec: the wanted bits, group size, symmetry; `in_features` and `out_features` are w's.
      scale_dtype: float16, bfloat16 or float32.

    Returns:
      The leaf dict of the packed weight, with E in front of every leaf for experts.

    Raises:
      SpecError: if w's shape or dtype does not fit the spec, w is not finite or traced, or
        `scale_dtype` is not one of the three.

    Example:
      ```python
      spec = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=False, in_features=64, out_features=128
      )
      w = jax.random.normal(jax.random.key(0), (128, 64))
      packed = jaxwna16.quantize(w, spec)
      assert packed["packed"].shape == spec.packed_shape
      ```
    """
    w = convert_array("w", w)
    if w.ndim == 3 and w.shape[0]:
        each = [quantize(one, spec, scale_dtype=scale_dtype) for one in w]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    if w.shape != (spec.out_features, spec.in_features) or not jnp.issubdtype(
        w.dtype, jnp.floating
    ):
        raise SpecError(
            f"w must be floats [{spec.out_features}, {spec.in_features}], "
            f"got {w.dtype} {list(w.shape)}"
        )
    scale_dtype = check_float_dtype("scale_dtype", scale_dtype)
    least, most, finite = _find_ranges(w, spec)
    try:
        valid = bool(finite)
    except jax.errors.TracerBoolConversionError:
        raise SpecError(
            "quantize checks the values of w, and a traced array has none yet: "
            "call it outside jax.jit, jax.vmap and jax.eval_shape"
        ) from None
    ranges = np.asarray(least), np.asarray(most)
    scale, zero_point = _choose_parameters(*ranges, spec, scale_dtype)
    if not (valid and np.isfinite(scale).all()):
        raise SpecError(f"w holds NaN or infinity, or a group's range overflows {scale_dtype.name}")
    return _round(w, scale, zero_point, spec)


@functools.partial(jax.jit, static_argnames="spec")
def _find_ranges(w: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Least and most of each group widened to hold 0, float32 [N, G], and whether w is finite."""
    groups = _group(w, spec)
    least, most = groups.min(axis=2), groups.max(axis=2)
    return jnp.minimum(least, 0.0), jnp.maximum(most, 0.0), jnp.isfinite(groups).all()


def _choose_parameters(
    least: np.ndarray, most: np.ndarray, spec: QuantSpec, scale_dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Scale in `scale_dtype` and zero point int8 (0 if symmetric), [N, G], of float32 ranges.

    NumPy computes them: XLA would multiply by the reciprocal of a constant, and may skip the
    rounding to bfloat16 before a float32 ("excess precision"). Either changes integers.
    """
    low, steps = -spec.offset, 2**spec.bits - 1
    # what overflows is infinite, which the caller refuses
    with np.errstate(over="ignore", invalid="ignore"):
        if spec.symmetric:
            scale = np.maximum(-least, most) / np.float32(steps / 2)
            zero_point = np.zeros(scale.shape, np.int8)
        else:
            scale = (most - least) / np.float32(steps)
            # an all-zero group has scale 0; any zero point serves it
            divisor = np.where(scale == 0, np.float32(1), scale)
            exact = np.where(scale == 0, np.float32(0), low - least / divisor)
            zero_point = np.round(np.clip(exact, low, low + steps)).astype(np.int8)
        scale = scale.astype(scale_dtype)
    smallest = np.asarray(jnp.finfo(scale_dtype).eps, scale_dtype)
    return np.where(scale == 0, smallest, scale), zero_point


@functools.partial(jax.jit, static_argnames="spec")
def _round(
    w: jax.Array, scale: jax.Array, zero_point: jax.Array, spec: QuantSpec
) -> dict[str, jax.Array]:
    """The leaf dict of w for scales and zero points [N, G]."""
    low, high = -spec.offset, spec.offset - 1
    groups = _group(w, spec)
    divisor = jnp.broadcast_to(scale.astype(jnp.float32)[:, :, None], groups.shape)
    # the barrier keeps the division: XLA would multiply by the reciprocal of a broadcast
    shifted = (
        groups / lax.optimization_barrier(divisor) + zero_point.astype(jnp.float32)[:, :, None]
    )
    q = jnp.round(jnp.clip(shifted, low, high)).astype(jnp.int32)
    codes = (q + spec.offset).astype(jnp.uint8).reshape(spec.out_features, spec.in_features)
    weights = {"packed": tiles_from_codes(codes, spec), "scale": pad_groups(scale, spec)}
    if not spec.symmetric:
        weights["zero_point"] = pad_groups(zero_point, spec)
    return weights


def _group(w: jax.Array, spec: QuantSpec) -> jax.Array:
    return w.astype(jnp.float32).reshape(spec.out_features, spec.groups, spec.group_size)


def pad_groups(grouped: jax.Array, spec: QuantSpec) -> jax.Array:
    """[N, G] as in a checkpoint -> `spec.scale_shape`: transposed, padded along N with zeros."""
    return jnp.pad(grouped.T, ((0, 0), (0, spec.tiles_n * TILE_N - spec.out_features)))
