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

from loaders.modules.awq_gptq_words import list_tensors_of, read_weight, read_zero_points
from loaders.modules.encoding import Encoding
from loaders.schemes.packings import ALIGNED, TRANSPOSED
from pallas_kernels.errors import SpecError
from pallas_kernels.format.layout import (
    codes_from_tiles,
    codes_from_words,
    tiles_from_codes,
    words_from_codes,
)
from pallas_kernels.format.quantize import pad_groups
from pallas_kernels.format.spec import TILE_N, QuantSpec
from pallas_kernels.format.weights import SCALE_DTYPES, check_weights


def expected_tensors(
    spec: QuantSpec, encoding: Encoding | None = None
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Name -> (allowed dtypes, shape) of a module's tensors in a pack-quantized file.

    `weight_zero_point` is packed along N, the others along K (compressed-tensors,
    `compressors/pack_quantized/base.py`). Without an encoding it is the one of today's versions.
    Those of AutoAWQ and GPTQ are in `loaders.modules.awq_gptq_words`.
    """
    encoding = encoding or encode(spec)
    if encoding.words in TRANSPOSED:
        return list_tensors_of(spec, encoding)
    n, k = spec.out_features, spec.in_features
    tensors = {
        "weight_packed": (("int32",), (n, encoding.count_words(k))),
        "weight_scale": (SCALE_DTYPES, (n, spec.groups)),
        "weight_shape": (("int64", "int32"), (2,)),
    }
    if encoding.zero_points == "words":
        tensors["weight_zero_point"] = (("int32",), (encoding.count_words(n), spec.groups))
    elif encoding.zero_points == "bytes":
        tensors["weight_zero_point"] = (("int8",), (n, spec.groups))
    if encoding.reordered:
        tensors["weight_g_idx"] = (("int32",), (k,))
    return tensors


def encode(spec: QuantSpec) -> Encoding:
    """How today's versions lay out a weight of that many bits."""
    return Encoding(bits=spec.bits, zero_points="none" if spec.symmetric else "words")


def pack(
    tensors: Mapping[str, Any], spec: QuantSpec, encoding: Encoding | None = None
) -> dict[str, jax.Array]:
    """Repack one module's tensors into the tile layout, exactly.

    Args:
      tensors: NumPy or JAX arrays by their names in the checkpoint without the module's path:
        `weight_packed`, `weight_scale`, `weight_zero_point` where asymmetric, and optionally
        `weight_shape` (checked) and `bias` (kept as it is).
      spec: the static facts of what it becomes.
      encoding: how the tensors hold it; None is as today's versions of compressed-tensors do, with
        the bits of `spec`.

    Returns:
      The leaf dict: packed, scale, zero_point where asymmetric, perm where the features were
      reordered, bias where given.

    Raises:
      SpecError: listing every tensor that is missing, unknown, or of a wrong dtype or shape.

    Example:
      ```python
      spec = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=False, in_features=64, out_features=128
      )
      packed = jaxwna16.quantize(jax.random.normal(jax.random.key(0), (128, 64)), spec)
      tensors = jaxwna16.unpack(packed, spec)  # as the files of a checkpoint hold them
      again = jaxwna16.pack(tensors, spec)
      assert (again["packed"] == packed["packed"]).all()
      ```
    """
    tensors = dict(tensors)
    bias = tensors.pop("bias", None)
    encoding = encoding or encode(spec)
    expected, optional = expected_tensors(spec, encoding), _list_optional(encoding)
    faults = []
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            faults += [] if name in optional else [f"{name} is missing"]
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
    weights = _pack(words, spec, encoding)
    return weights if bias is None else weights | {"bias": jnp.asarray(bias)}


def pack_expert(
    stack: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    spec: QuantSpec,
    expert: int,
    row: int,
    encoding: Encoding | None = None,
) -> dict[str, Any]:
    """Repack one expert's tensors into its rows of a stack, in place.

    Args:
      stack: the leaf dict without a bias, the experts in front. NumPy arrays are written to; JAX
        arrays are donated, so use what is returned. The rows to be filled hold zeros.
      tensors: `weight_packed`, `weight_scale`, and `weight_zero_point` where asymmetric, of dtypes
        and shapes that fit `spec`.
      spec: of these tensors. The stack's may have more rows.
      expert: which one, counted from 0.
      row: the first row to be filled.
      encoding: as in `pack`; a `weight_g_idx` is not looked at.
    """
    words = {name: _view_uint32(array) for name, array in tensors.items()}
    encoding = encoding or encode(spec)
    if not isinstance(stack["packed"], np.ndarray):
        return _pack_expert(dict(stack), words, expert, spec, row, encoding)
    for name, rows in _pack_rows(words, spec, row % TILE_N, encoding).items():
        if name == "packed":
            first = row // TILE_N
            stack[name][expert, first : first + len(rows)] |= np.asarray(rows)
        else:
            stack[name][expert, :, row : row + spec.out_features] = np.asarray(rows)
    return dict(stack)


def unpack(weights: Mapping[str, jax.Array], spec: QuantSpec) -> dict[str, np.ndarray]:
    """Turn a leaf dict back into the tensors of a pack-quantized checkpoint; the inverse of `pack`.

    Returns:
      NumPy arrays `weight_packed`, `weight_scale`, `weight_shape`, and `weight_zero_point` and
      `bias` where the leaf dict has them.

    Raises:
      SpecError: if the arrays contradict the spec.

    Example:
      ```python
      spec = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=False, in_features=64, out_features=128
      )
      packed = jaxwna16.quantize(jax.random.normal(jax.random.key(0), (128, 64)), spec)
      tensors = jaxwna16.unpack(packed, spec)
      assert tensors["weight_packed"].shape == (128, 64 * 4 // 32)
      ```
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


@functools.partial(jax.jit, static_argnames=("spec", "encoding"))
def _pack(
    tensors: dict[str, jax.Array], spec: QuantSpec, encoding: Encoding
) -> dict[str, jax.Array]:
    codes, weights = _read_codes(tensors, spec, encoding), {}
    if encoding.reordered:
        weights["perm"] = _sort_features(tensors["weight_g_idx"])
        codes = codes[:, weights["perm"]]
    weights["packed"] = tiles_from_codes(codes, spec)
    weights["scale"] = pad_groups(_read_scale(tensors, spec, encoding), spec)
    if not spec.symmetric:
        weights["zero_point"] = pad_groups(_read_zero_points(tensors, spec, encoding), spec)
    return weights


def _sort_features(groups: jax.Array) -> jax.Array:
    """int32 [K]: the input features group by group, in their order; negative is column order."""
    groups = lax.bitcast_convert_type(groups, jnp.int32)  # as words they have no sign
    order = jnp.argsort(groups, stable=True).astype(jnp.int32)
    return jnp.where((groups < 0).any(), jnp.arange(groups.size, dtype=jnp.int32), order)


@functools.partial(jax.jit, static_argnames=("spec", "row", "encoding"), donate_argnames="stack")
def _pack_expert(
    stack: dict[str, jax.Array],
    tensors: dict[str, jax.Array],
    expert: jax.Array,
    spec: QuantSpec,
    row: int,
    encoding: Encoding,
) -> dict[str, jax.Array]:
    rows = _pack_rows(tensors, spec, row % TILE_N, encoding)
    tiles = rows.pop("packed")[None]
    start = (expert, row // TILE_N, 0, 0, 0)
    held = lax.dynamic_slice(stack["packed"], start, tiles.shape)
    filled = {"packed": lax.dynamic_update_slice(stack["packed"], held | tiles, start)}
    for name, values in rows.items():
        filled[name] = lax.dynamic_update_slice(stack[name], values[None], (expert, 0, row))
    return filled


@functools.partial(jax.jit, static_argnames=("spec", "shift", "encoding"))
def _pack_rows(
    tensors: dict[str, jax.Array], spec: QuantSpec, shift: int, encoding: Encoding
) -> dict[str, jax.Array]:
    """What one expert adds to a stack: tiles whose first `shift` rows are 0, and [G, N] of others.

    The first and the last tile may hold rows of gate and of up: they are to be or-ed.
    """
    codes = _read_codes(tensors, spec, encoding)
    shifted = dataclasses.replace(spec, out_features=shift + spec.out_features)
    rows = {"packed": tiles_from_codes(jnp.pad(codes, ((shift, 0), (0, 0))), shifted)}
    rows["scale"] = _read_scale(tensors, spec, encoding).T
    if not spec.symmetric:
        rows["zero_point"] = _read_zero_points(tensors, spec, encoding).T
    return rows


def write_rows(stack: Any, rows: Any, expert: int, first: int) -> Any:
    """Write `rows` [n, ...] into `stack` [E, N, ...] from row `first` of an expert on, in place.

    A NumPy stack is written to; a JAX array is donated: use what is returned.
    """
    if isinstance(stack, np.ndarray):
        stack[expert, first : first + len(rows)] = np.asarray(rows)
        return stack
    return _write_rows(stack, rows, expert, first)


@functools.partial(jax.jit, donate_argnames="stack")
def _write_rows(
    stack: jax.Array, rows: jax.Array, expert: jax.Array, first: jax.Array
) -> jax.Array:
    return lax.dynamic_update_slice(stack, rows[None], (expert, first, *[0] * (rows.ndim - 1)))


def _read_codes(tensors: dict[str, jax.Array], spec: QuantSpec, encoding: Encoding) -> jax.Array:
    """uint8 [N, K], of `spec.bits` bits."""
    words, k = tensors["weight_packed"], spec.in_features
    if encoding.words in TRANSPOSED:
        codes = read_weight(words, encoding, k)
    else:
        codes = codes_from_words(words, encoding.bits, k, aligned=encoding.words == ALIGNED)
    # the same numbers with a sign have another offset without one
    return codes + jnp.uint8(spec.offset - (1 << encoding.bits - 1))


def _read_zero_points(
    tensors: dict[str, jax.Array], spec: QuantSpec, encoding: Encoding
) -> jax.Array:
    """int8 [N, G]."""
    if encoding.zero_points == "zeros":
        return jnp.zeros((spec.out_features, spec.groups), jnp.int8)
    found, n = tensors["weight_zero_point"], spec.out_features
    if encoding.zero_points == "bytes":
        return found
    if encoding.words in TRANSPOSED:
        codes = read_zero_points(found, encoding, n)
    else:
        aligned = encoding.words == ALIGNED
        codes = codes_from_words(found.T, encoding.bits, n, aligned=aligned).T
    codes = _divide_groups(codes, spec, encoding)
    return (codes.astype(jnp.int16) - (1 << encoding.bits - 1)).astype(jnp.int8)


def _read_scale(tensors: dict[str, jax.Array], spec: QuantSpec, encoding: Encoding) -> jax.Array:
    """[N, G]."""
    scale = tensors["weight_scale"]
    return _divide_groups(scale.T if encoding.words in TRANSPOSED else scale, spec, encoding)


def _divide_groups(values: jax.Array, spec: QuantSpec, encoding: Encoding) -> jax.Array:
    """[N, groups of the files] -> [N, G] of the tile layout, where each may be a part of one."""
    if encoding.group_size is None:
        return values
    parts = encoding.group_size // spec.group_size
    return jnp.repeat(values, parts, axis=1)[:, : spec.groups]


def _list_optional(encoding: Encoding) -> set[str]:
    """Tensors of `expected_tensors` that decide nothing."""
    ignored = {"weight_shape"}
    if encoding.words in TRANSPOSED:
        ignored |= set() if encoding.reordered else {"weight_g_idx"}
        ignored |= {"weight_zero_point"} if encoding.zero_points.startswith("middle") else set()
    return ignored


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
