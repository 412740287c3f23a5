"""`dequantize` equals compressed-tensors' `decompress` bit for bit."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from loaders.modules.repack import pack
from pallas_kernels.errors import SpecError
from pallas_kernels.format.dequantize import dequantize
from pallas_kernels.format.spec import QuantSpec
from tests.checkpoints import (
    assert_same_bits,
    compress,
    decompress,
    make_args,
    make_weight,
    to_numpy,
)
from tests.folders import make_codes, make_tensors
from tests.grids import cover

# N, K, group size and scales: every kind of group with every scale, and odd shapes
CASES = [
    (*shape, scale_dtype)
    for shape in [(830, 544, 32), (70, 192, 64), (65, 384, 128), (96, 33, -1)]
    for scale_dtype in ("float16", "bfloat16", "float32")
]
CASES += [(1, 32, 32, "float16"), (7, 100, -1, "bfloat16"), (33, 85, 17, "bfloat16")]


def _make_spec(bits, symmetric, shape) -> QuantSpec:
    n, k, group = shape
    return QuantSpec(
        bits=bits, group_size=group, symmetric=symmetric, in_features=k, out_features=n
    )


@pytest.mark.parametrize(
    ("n", "k", "group", "scale_dtype", "bits", "symmetric"),
    cover(CASES, [(4, True), (8, False), (4, False), (8, True)]),
)
def test_weight_equals_that_of_compressed_tensors_bit_for_bit(
    n, k, group, scale_dtype, bits, symmetric
):
    spec = _make_spec(bits, symmetric, (n, k, group))
    args = make_args(spec, scale_dtype)
    tensors = compress(make_weight((spec.out_features, spec.in_features)), args)
    arrays = {role: to_numpy(tensor) for role, tensor in tensors.items()}
    weights = pack(arrays, spec)
    assert_same_bits(dequantize(weights, spec), decompress(tensors, args))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_difference_of_integers_is_rounded_as_compressed_tensors_does(bits, scale_dtype):
    """All (q, zero point) with scales that round up, round down, tie, overflow and underflow."""
    count = 2**bits
    spec = _make_spec(bits, False, (count * 8, count, -1))
    codes = np.tile(np.arange(count, dtype=np.uint8), (count * 8, 1))
    zeros = np.repeat(np.arange(count), 8)[:, None] - spec.offset
    scales = [1.0, 1 / 3, 2 / 3, 1.0078125, 1e-5, 6e-8, 0.9990234375, 60000.0]
    tensors = {
        "weight_packed": _pack_rows(codes, bits),
        "weight_scale": np.tile(np.array(scales, scale_dtype), count)[:, None],
        "weight_zero_point": _pack_rows((zeros + spec.offset).T, bits).T.copy(),
        "weight_shape": np.array(codes.shape),
    }
    args = make_args(spec)
    as_torch = {role: _to_torch(array) for role, array in tensors.items()}
    expected = decompress(as_torch, args)
    if scale_dtype == "float16":
        assert torch.isinf(expected).any()
        assert ((expected != 0) & (expected.abs() < 2.0**-14)).any()  # subnormal numbers
    assert_same_bits(dequantize(pack(tensors, spec), spec), expected)


def test_few_rows_with_several_zero_points_follow_from_the_codes():
    """compressed-tensors 0.20 cannot unpack 4-bit zero points of N <= 8 rows in several groups."""
    spec = _make_spec(4, False, (5, 64, 32))
    tensors = make_tensors(spec, scale_dtype=np.float32)
    zeros = (tensors["weight_zero_point"].view(np.uint32)[0] >> (4 * np.arange(5)[:, None])) & 0xF
    wide_zeros, scale = (np.repeat(a, 32, axis=1) for a in (zeros, tensors["weight_scale"]))
    difference = make_codes(spec).astype(np.float32) - wide_zeros.astype(np.float32)
    assert_same_bits(dequantize(pack(tensors, spec), spec), difference * scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype_is_a_cast_of_the_rounded_weight(scale_dtype, dtype):
    spec = _make_spec(8, False, (5, 64, 32))
    weights = pack(make_tensors(spec, scale_dtype=jnp.dtype(scale_dtype)), spec)
    rounded = np.asarray(dequantize(weights, spec))
    assert rounded.dtype == scale_dtype
    assert_same_bits(dequantize(weights, spec, jnp.dtype(dtype)), rounded.astype(dtype))


def test_padding_never_reaches_the_weight():
    spec = _make_spec(4, False, (3, 40, 8))
    weights = pack(make_tensors(spec), spec)
    dirty = {name: np.array(array) for name, array in weights.items()}
    dirty["packed"][0, 0, 3:] = 0xFFFF
    dirty["packed"][0, 0, :, 8:] |= 0xFFF0
    dirty["scale"][:, 3:], dirty["zero_point"][:, 3:] = np.nan, 127
    dirty = {name: jnp.asarray(array) for name, array in dirty.items()}
    assert_same_bits(dequantize(dirty, spec), dequantize(weights, spec))


def test_arrays_that_contradict_the_spec_are_all_listed():
    spec = _make_spec(4, True, (3, 64, 32))
    weights = {
        "packed": jnp.zeros((1, 1, 64, 32), jnp.int16),
        "scale": jnp.zeros((2, 3), jnp.float32),
        "zero_point": jnp.zeros((2, 64), jnp.int8),
    }
    with pytest.raises(SpecError) as caught:
        dequantize(weights, spec)
    message = str(caught.value)
    assert "packed is int16, expected uint16" in message
    assert "scale has shape [2, 3], expected [2, 64]" in message
    assert "zero_point is not expected in a symmetric weight" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": None}, "scale is missing"),
        ({"packed": None}, "packed is missing"),
        ({"zero_point": None}, "zero_point is missing"),
        ({"scale": jnp.zeros((2, 64), jnp.int32)}, "scale is int32, expected one of float16"),
        ({"zero_point": jnp.zeros((2, 64), jnp.uint8)}, "zero_point is uint8, expected int8"),
        ({"bias": jnp.zeros(2)}, r"bias has shape \[2\], expected \[3\]"),
        ({"bias": jnp.zeros(3, jnp.int32)}, "bias is int32, expected a float dtype"),
        ({"g_idx": jnp.zeros(3)}, "g_idx is not expected in an asymmetric weight"),
        ({"perm": jnp.zeros(3, jnp.int32)}, r"perm has shape \[3\], expected \[64\]"),
        ({"perm": jnp.zeros(64)}, "perm is float32, expected int32"),
        ({"scale": [1.0]}, "weights must be arrays, found {'scale': 'list'}"),
    ],
)
def test_one_wrong_leaf_is_named(change, message):
    spec = _make_spec(4, False, (3, 64, 32))
    weights = pack(make_tensors(spec), spec) | change
    weights = {name: leaf for name, leaf in weights.items() if leaf is not None}
    with pytest.raises(SpecError, match=message):
        dequantize(weights, spec)


def test_what_is_no_dict_or_no_spec_is_refused():
    spec = _make_spec(4, False, (3, 64, 32))
    with pytest.raises(SpecError, match=r"weights must be the dict .* got list"):
        dequantize([1], spec)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match="spec must be a QuantSpec, got dict"):
        dequantize(pack(make_tensors(spec), spec), {})  # pyright: ignore[reportArgumentType]


def _pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Whole words of unsigned codes [rows, columns], int32."""
    fields = codes.astype(np.uint32).reshape(codes.shape[0], -1, 32 // bits)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return np.bitwise_or.reduce(fields << shifts, axis=2).astype(np.uint32).view(np.int32)


def _to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
