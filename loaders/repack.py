"""A checkpoint's tensors of one module <-> the leaf dict in the tile layout."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.errors import SpecError
from pallas_kernels.layout import (
    codes_from_tiles,
    codes_from_words,
    tiles_from_codes,
    words_from_codes,
)
from pallas_kernels.quantize import pad_groups
from pallas_kernels.spec import TILE_N, QuantSpec
from pallas_kernels.weights import SCALE_DTYPES, check_weights


def expected_tensors(spec: QuantSpec) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Name -> (allowed dtypes, shape) of a module's tensors in a pack-quantized file.

    `weight_zero_point` is packed along N, the others along K (compressed-tensors,
    `compressors/pack_quantized/base.py`).
    """
    per_word = 32 // spec.bits
    n, k = spec.out_features, spec.in_features
    tensors = {
        "weight_packed": (("int32",), (n, -(-k // per_word))),
        "weight_scale": (SCALE_DTYPES, (n, spec.groups)),
        "weight_shape": (("int64", "int32"), (2,)),
    }
    if not spec.symmetric:
        tensors["weight_zero_point"] = (("int32",), (-(-n // per_word), spec.groups))
    return tensors


def pack(tensors: Mapping[str, Any], spec: QuantSpec) -> dict[str, jax.Array]:
    """Repack one module's tensors into the tile layout, exactly.

    Args:
      tensors: NumPy or JAX arrays by their names in the checkpoint without the module's path:
        `weight_packed`, `weight_scale`, `weight_zero_point` where asymmetric, and optionally
        `weight_shape` (checked) and `bias` (kept as it is).
      spec: the module's static facts.

    Returns:
      The leaf dict: packed, scale, zero_point where asymmetric, bias where given.

    Raises:
      SpecError: listing every tensor that is missing, unknown, or of a wrong dtype or shape.
    """
    tensors = dict(tensors)
    bias = tensors.pop("bias", None)
    expected = expected_tensors(spec)
    faults = []
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            faults += [] if name == "weight_shape" else [f"{name} is missing"]
        elif name not in expected:
            faults.append(f"{name} is not expected")
        elif not hasattr(tensors[name], "dtype"):
            faults.append(f"{name}: expected an array, found {type(tensors[name]).__name__}")
        else:
            (dtypes, shape), found = expected[name], tensors[name]
            if str(found.dtype) not in dtypes or tuple(found.shape) != shape:
                faults.append(
                    f"{name}: expected {' or '.join(dtypes)} {list(shape)}, "
                    f"found {found.dtype} {list(found.shape)}"
                )
    shape, sizes = tensors.pop("weight_shape", None), [spec.out_features, spec.in_features]
    if shape is not None and not faults and np.asarray(shape).tolist() != sizes:
        faults.append(f"weight_shape is {np.asarray(shape).tolist()}, expected {sizes}")
    if faults:
        raise SpecError(f"tensors contradict {spec}: " + "; ".join(faults))
    words = {name: _view_uint32(array) for name, array in tensors.items()}
    weights = _pack(words, spec)
    return weights if bias is None else weights | {"bias": jnp.asarray(bias)}


def pack_expert(
    stack: Mapping[str, jax.Array],
    tensors: Mapping[str, np.ndarray],
    spec: QuantSpec,
    expert: int,
    row: int,
) -> dict[str, jax.Array]:
    """Repack one expert's tensors into its rows of a stack, in place.

    Args:
      stack: the leaf dict without a bias, the experts in front; it is donated, so use what is
        returned. The rows to be filled hold zeros.
      tensors: `weight_packed`, `weight_scale`, and `weight_zero_point` where asymmetric, of dtypes
        and shapes that fit `spec`.
      spec: of these tensors. The stack's may have more rows.
      expert: which one, counted from 0.
      row: the first row to be filled.
    """
    words = {name: _view_uint32(array) for name, array in tensors.items()}
    return _pack_expert(dict(stack), words, expert, spec, row)


def unpack(weights: Mapping[str, jax.Array], spec: QuantSpec) -> dict[str, np.ndarray]:
    """Turn a leaf dict back into the tensors of a pack-quantized checkpoint; the inverse of `pack`.

    Returns:
      NumPy arrays `weight_packed`, `weight_scale`, `weight_shape`, and `weight_zero_point` and
      `bias` where the leaf dict has them.

    Raises:
      SpecError: if the arrays contradict the spec.
    """
    check_weights(weights, spec)
    leaves = dict(weights)
    bias = leaves.pop("bias", None)
    tensors = {name: np.asarray(array) for name, array in _unpack(leaves, spec).items()}
    for name in ("weight_packed", "weight_zero_point"):
        if name in tensors:
            tensors[name] = tensors[name].view(np.int32)
    tensors["weight_shape"] = np.array([spec.out_features, spec.in_features], np.int64)
    return tensors if bias is None else tensors | {"bias": np.asarray(bias)}


@functools.partial(jax.jit, static_argnames="spec")
def _pack(tensors: dict[str, jax.Array], spec: QuantSpec) -> dict[str, jax.Array]:
    codes = codes_from_words(tensors["weight_packed"], spec.bits, spec.in_features)
    weights = {
        "packed": tiles_from_codes(codes, spec),
        "scale": pad_groups(tensors["weight_scale"], spec),
    }
    if not spec.symmetric:
        weights["zero_point"] = pad_groups(_read_zero_points(tensors, spec), spec)
    return weights


@functools.partial(jax.jit, static_argnames=("spec", "row"), donate_argnames="stack")
def _pack_expert(
    stack: dict[str, jax.Array],
    tensors: dict[str, jax.Array],
    expert: jax.Array,
    spec: QuantSpec,
    row: int,
) -> dict[str, jax.Array]:
    shift = row % TILE_N
    codes = codes_from_words(tensors["weight_packed"], spec.bits, spec.in_features)
    shifted = dataclasses.replace(spec, out_features=shift + spec.out_features)
    tiles = tiles_from_codes(jnp.pad(codes, ((shift, 0), (0, 0))), shifted)
    start = (expert, row // TILE_N, 0, 0, 0)
    # the first and the last tile may hold rows of gate and of up; those of the other are 0 here
    held = lax.dynamic_slice(stack["packed"], start, (1, *tiles.shape))
    filled = {"packed": lax.dynamic_update_slice(stack["packed"], held | tiles[None], start)}
    grouped = {"scale": tensors["weight_scale"]}
    if not spec.symmetric:
        grouped["zero_point"] = _read_zero_points(tensors, spec)
    for name, values in grouped.items():
        filled[name] = lax.dynamic_update_slice(stack[name], values.T[None], (expert, 0, row))
    return filled


@functools.partial(jax.jit, donate_argnames="stack")
def write_rows(stack: jax.Array, rows: jax.Array, expert: jax.Array, first: jax.Array) -> jax.Array:
    """Write `rows` [n, ...] into `stack` [E, N, ...] from row `first` of an expert on, in place.

    The stack is donated: use what is returned.
    """
    return lax.dynamic_update_slice(stack, rows[None], (expert, first, *[0] * (rows.ndim - 1)))


def _read_zero_points(tensors: dict[str, jax.Array], spec: QuantSpec) -> jax.Array:
    """int8 [N, G]."""
    codes = codes_from_words(tensors["weight_zero_point"].T, spec.bits, spec.out_features)
    return (codes.astype(jnp.int16) - spec.offset).astype(jnp.int8).T


@functools.partial(jax.jit, static_argnames="spec")
def _unpack(weights: dict[str, jax.Array], spec: QuantSpec) -> dict[str, jax.Array]:
    n = spec.out_features
    tensors = {
        "weight_packed": words_from_codes(codes_from_tiles(weights["packed"], spec), spec.bits),
        "weight_scale": weights["scale"][:, :n].T,
    }
    if not spec.symmetric:
        codes = (weights["zero_point"][:, :n].astype(jnp.int16) + spec.offset).astype(jnp.uint8)
        tensors["weight_zero_point"] = words_from_codes(codes, spec.bits).T
    return tensors


def _view_uint32(array: Any) -> Any:
    """int32 words as uint32 (the bits are what counts); other arrays as they are."""
    if array.dtype != np.int32:
        return array
    if isinstance(array, np.ndarray):
        return array.view(np.uint32)
    return jax.lax.bitcast_convert_type(array, jnp.uint32)
