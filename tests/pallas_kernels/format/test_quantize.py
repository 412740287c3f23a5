"""`quantize` chooses the scales, zero points and integers that compressed-tensors chooses."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import quantize as reference_quantize

from loaders.modules.repack import unpack
from pallas_kernels.errors import SpecError
from pallas_kernels.format.dequantize import dequantize
from pallas_kernels.format.layout import codes_from_tiles
from pallas_kernels.format.quantize import quantize
from pallas_kernels.format.spec import QuantSpec
from tests.checkpoints import (
    assert_same_bits,
    choose_parameters,
    compress,
    decompress,
    make_args,
    make_weight,
)
from tests.grids import cover, sample


def _make_spec(bits, symmetric, n, k, group) -> QuantSpec:
    return QuantSpec(
        bits=bits, group_size=group, symmetric=symmetric, in_features=k, out_features=n
    )


def _make_hard_weight(n: int, k: int) -> torch.Tensor:
    """Rows of many magnitudes; all-zero, one-sided and constant groups; ties of the rounding."""
    weight = make_weight((n, k))
    weight[0], weight[1, :32] = 0, 0
    weight[2], weight[3] = weight[2].abs(), -weight[3].abs()
    weight[4], weight[5] = 0.25, -0.25
    weight[6] = torch.arange(k) % 16 - 7.5  # with 4 bits the scale is 1 and every quotient ties
    weight[7] *= 1e-6
    weight[8, 0] = -0.0
    return weight


@pytest.mark.parametrize(
    ("group", "bits", "symmetric", "scale_dtype"),
    sample(
        itertools.product((32, -1), (4, 8), (True, False), ("float16", "bfloat16", "float32")),
        every=5,
    ),
)
def test_scales_zero_points_and_integers_are_those_of_compressed_tensors(
    group, bits, symmetric, scale_dtype
):
    n, k = 200, 192
    spec, weight = _make_spec(bits, symmetric, n, k, group), _make_hard_weight(n, k)
    args = make_args(spec, scale_dtype)
    scale, zero_point = choose_parameters(weight, args)
    q = reference_quantize(
        x=weight, scale=scale, zero_point=zero_point, args=args, dtype=torch.int8
    )
    weights = quantize(jnp.asarray(weight.numpy()), spec, scale_dtype=jnp.dtype(scale_dtype))
    assert_same_bits(weights["scale"][:, :n].T, scale.to(args.scale_dtype))
    if not symmetric:
        assert_same_bits(weights["zero_point"][:, :n].T, zero_point)
    ours = np.asarray(codes_from_tiles(weights["packed"], spec)).astype(np.int16) - spec.offset
    np.testing.assert_array_equal(ours, q.numpy())


@pytest.mark.parametrize(
    ("bits", "shape", "symmetric"),
    cover([(4, (96, 33, -1)), (8, (70, 192, 64)), (4, (1, 8, 2))], [True, False]),
)
def test_unpacked_tensors_are_what_compressed_tensors_writes(bits, shape, symmetric):
    n, k, group = shape
    spec, weight = _make_spec(bits, symmetric, n, k, group), make_weight((n, k))
    args = make_args(spec, "bfloat16")
    tensors = compress(weight, args)
    weights = quantize(jnp.asarray(weight.numpy()), spec)
    ours = unpack(weights, spec)
    assert ours.keys() == tensors.keys()
    for role, tensor in tensors.items():
        assert_same_bits(ours[role], tensor)
    if n > 8:  # fewer rows than compressed-tensors 0.20 can unpack
        assert_same_bits(dequantize(weights, spec), decompress(tensors, args))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_at_most_half_a_step(symmetric, bits):
    """|w - (q - z) s| <= s/2, but for the ends of the range.

    Symmetric: max|w| = (a/2) s, half a step beyond the largest integer, so s/2 holds there too.
    Asymmetric: the zero point is rounded, which moves the range by up to s/2: an end may be s away.
    Scales are float32; each of the four operations rounds by 2^-24 of at most 2^bits s.
    """
    spec, weight = _make_spec(bits, symmetric, 40, 96, 32), make_weight((40, 96)).numpy()
    weights = quantize(weight, spec, scale_dtype=jnp.float32)
    error = np.abs(np.asarray(dequantize(weights, spec), np.float64) - weight)
    step = np.repeat(np.asarray(weights["scale"], np.float64)[:, :40].T, 32, axis=1)
    slack = 4 * 2.0**-24 * 2**bits
    assert (error / step).max() <= (0.5 if symmetric else 1.0) + slack
    assert np.mean(error / step > 0.5 + slack) < 0.05


def test_a_group_of_zeros_stays_zero():
    spec = _make_spec(4, False, 3, 64, 32)
    weights = quantize(jnp.zeros((3, 64)), spec, scale_dtype=jnp.float16)
    assert (np.asarray(weights["scale"])[:, :3] > 0).all()
    np.testing.assert_array_equal(dequantize(weights, spec), np.zeros((3, 64)))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sixteen_bit_weights_are_quantized_in_float32(dtype):
    spec = _make_spec(4, False, 20, 64, 32)
    weight = make_weight((20, 64)).numpy().astype(dtype)
    narrow = quantize(weight, spec, scale_dtype=dtype)
    wide = quantize(weight.astype(np.float32), spec, scale_dtype=dtype)
    for name in wide:
        assert_same_bits(narrow[name], wide[name])


def test_padding_is_zero():
    spec = _make_spec(4, False, 3, 40, 8)
    weights = {
        name: np.asarray(a) for name, a in quantize(np.ones((3, 40), np.float32), spec).items()
    }
    assert not weights["packed"][0, 0, 3:].any()
    assert not (weights["packed"][0, 0, :3, 8:] >> 4).any()
    assert not weights["scale"][:, 3:].any()
    assert not weights["zero_point"][:, 3:].any()


@pytest.mark.parametrize(
    ("weight", "scale_dtype", "message"),
    [
        (np.full((3, 64), np.nan, np.float32), jnp.float32, "NaN or infinity"),
        (np.full((3, 64), -np.inf, np.float32), jnp.float32, "NaN or infinity"),
        (np.full((3, 64), 3e38, np.float32) * [[1], [-1], [1]], jnp.float16, "overflows float16"),
        (np.ones((3, 64), np.int32), jnp.float32, r"must be floats \[3, 64\], got int32"),
        (
            np.ones((64, 3), np.float32),
            jnp.float32,
            r"must be floats \[3, 64\], got float32 \[64, 3\]",
        ),
        (np.ones((3, 64), np.float32), jnp.int8, "scale_dtype must be .* got int8"),
        (np.ones((3, 64), np.float32), jnp.float8_e4m3fn, "got float8_e4m3fn"),
        (np.ones((3, 64), np.float32), "foo", "scale_dtype must be .* got 'foo'"),
    ],
)
def test_weight_that_cannot_be_quantized_is_refused(weight, scale_dtype, message):
    with pytest.raises(SpecError, match=message):
        quantize(weight, _make_spec(4, False, 3, 64, 32), scale_dtype=scale_dtype)


@pytest.mark.parametrize(
    "trace",
    [lambda f, w: jax.jit(f)(w), lambda f, w: jax.vmap(f)(w[None]), jax.eval_shape],
    ids=["jit", "vmap", "eval_shape"],
)
def test_traced_weight_is_refused_by_an_error_of_ours(trace):
    spec = _make_spec(4, False, 3, 64, 32)
    with pytest.raises(SpecError, match=r"call it outside jax\.jit"):
        trace(lambda w: quantize(w, spec), jnp.ones((3, 64)))
