"""`pack` and `unpack`: a checkpoint's tensors <-> the leaf dict, or a list of what is wrong."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from loaders.modules.repack import pack, unpack
from pallas_kernels.errors import SpecError
from pallas_kernels.format.layout import codes_from_tiles
from pallas_kernels.format.spec import QuantSpec
from tests.folders import make_codes, make_tensors

SIZES = st.one_of(st.sampled_from([1, 7, 8, 9, 63, 64, 65]), st.integers(1, 140))


@st.composite
def specs(draw) -> QuantSpec:
    size = draw(SIZES)
    return QuantSpec(
        bits=draw(st.sampled_from([4, 8])),
        group_size=size,
        symmetric=draw(st.booleans()),
        in_features=size * draw(st.integers(1, 3)),
        out_features=draw(SIZES),
    )


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    specs(), st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32]), st.integers(0, 99)
)
def test_unpack_is_the_inverse_of_pack(spec, scale_dtype, seed):
    tensors = make_tensors(spec, scale_dtype=scale_dtype, seed=seed)
    weights = pack(tensors, spec)
    codes = codes_from_tiles(np.asarray(weights["packed"]), spec)
    np.testing.assert_array_equal(codes, make_codes(spec, seed))
    n = spec.out_features
    np.testing.assert_array_equal(np.asarray(weights["scale"])[:, :n].T, tensors["weight_scale"])
    assert not np.asarray(weights["scale"])[:, n:].any()
    back = unpack(weights, spec)
    assert back.keys() == tensors.keys()
    for role, array in tensors.items():
        assert isinstance(back[role], np.ndarray)
        assert back[role].dtype == array.dtype
        np.testing.assert_array_equal(back[role], array)


def test_known_zero_points_are_read_along_n():
    """[10, 2] zero points with column 0 = -8..1 and column 1 = -1..7, -1: the words are known."""
    spec = QuantSpec(bits=4, group_size=1, symmetric=False, in_features=2, out_features=10)
    tensors = make_tensors(spec)
    words = np.array([[0x76543210, 0xEDCBA987], [0x98, 0x7F]], np.uint32).view(np.int32)
    zero_point = np.asarray(pack(tensors | {"weight_zero_point": words}, spec)["zero_point"])
    assert zero_point.dtype == np.int8
    np.testing.assert_array_equal(zero_point[0, :10], range(-8, 2))
    np.testing.assert_array_equal(zero_point[1, :10], [*range(-1, 8), -1])
    np.testing.assert_array_equal(zero_point[:, 10:], 0)


def test_jax_and_numpy_tensors_give_the_same_and_bias_is_kept():
    spec = QuantSpec(bits=8, group_size=32, symmetric=False, in_features=64, out_features=9)
    tensors = make_tensors(spec) | {"bias": np.arange(9, dtype=ml_dtypes.bfloat16)}
    on_host = pack(tensors, spec)
    shape = {"weight_shape": tensors.pop("weight_shape")}
    on_device = pack({role: jnp.asarray(a) for role, a in tensors.items()} | shape, spec)
    assert all(isinstance(leaf, jax.Array) for leaf in on_host.values())
    jax.tree.map(np.testing.assert_array_equal, on_host, on_device)
    assert on_host["bias"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(unpack(on_host, spec)["bias"], tensors["bias"])


def test_shape_is_optional_but_checked():
    spec = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=64, out_features=3)
    tensors = make_tensors(spec)
    pack({role: array for role, array in tensors.items() if role != "weight_shape"}, spec)
    pack(tensors | {"weight_shape": np.array([3, 64], np.int32)}, spec)
    with pytest.raises(SpecError, match=r"weight_shape is \[64, 3\], expected \[3, 64\]"):
        pack(tensors | {"weight_shape": np.array([64, 3])}, spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": None}, "weight_packed is missing"),
        ({"weight_scale": None}, "weight_scale is missing"),
        ({"weight_zero_point": None}, "weight_zero_point is missing"),
        ({"weight_g_idx": np.zeros(64, np.int32)}, "weight_g_idx is not expected"),
        ({"weight": np.zeros((9, 64))}, "weight is not expected"),
        (
            {"weight_packed": np.zeros((9, 8), np.int64)},
            "weight_packed: expected int32 [9, 8], found int64 [9, 8]",
        ),
        (
            {"weight_packed": np.zeros((8, 9), np.int32)},
            "weight_packed: expected int32 [9, 8], found int32 [8, 9]",
        ),
        (
            {"weight_zero_point": np.zeros((9, 2), np.int8)},
            "weight_zero_point: expected int32 [2, 2], found int8 [9, 2]",
        ),
        (
            {"weight_scale": np.zeros((9, 2))},
            "expected float16 or bfloat16 or float32 [9, 2], found float64 [9, 2]",
        ),
        ({"weight_scale": [[0.1]]}, "weight_scale: expected an array, found list"),
        (
            {"weight_shape": np.ones((2, 2), np.int64)},
            "weight_shape: expected int64 or int32 [2], found int64 [2, 2]",
        ),
        (
            {"weight_shape": np.array([9.0, 64.0])},
            "weight_shape: expected int64 or int32 [2], found float64 [2]",
        ),
    ],
)
def test_wrong_tensor_is_named_with_what_was_found(change, message):
    spec = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=64, out_features=9)
    tensors = make_tensors(spec) | change
    tensors = {role: array for role, array in tensors.items() if array is not None}
    with pytest.raises(SpecError) as caught:
        pack(tensors, spec)
    assert message in str(caught.value)


def test_every_wrong_tensor_is_listed():
    spec = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=64, out_features=9)
    tensors = {"weight_packed": np.zeros((1, 1), np.uint8), "weight_zero_point": np.zeros(1)}
    with pytest.raises(SpecError) as caught:
        pack(tensors, spec)
    assert all(f"weight_{role}" in str(caught.value) for role in ("packed", "scale", "zero_point"))


def test_unpack_refuses_what_is_no_leaf_dict_of_the_spec():
    spec = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=64, out_features=9)
    big = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=64, out_features=90)
    with pytest.raises(SpecError, match=r"packed has shape .*; scale has shape"):
        unpack(pack(make_tensors(spec), spec), big)
