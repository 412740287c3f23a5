"""The Triton kernel in interpret mode against the exact product in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.errors import BackendError
from pallas_kernels.spec import QuantSpec
from pallas_kernels.triton import _multiply_tile, matmul


@dataclasses.dataclass(frozen=True)
class Case:
    """Arrays as the kernel takes them, and the weight [N, K] they stand for, exact in float64."""

    spec: QuantSpec
    packed: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    weight: np.ndarray

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        zero_point = None if self.zero_point is None else jnp.asarray(self.zero_point)
        return jnp.asarray(self.packed), jnp.asarray(self.scale), zero_point


def _make_case(shape, group_size, bits, *, symmetric, scale_dtype=jnp.bfloat16, seed=0) -> Case:
    """Random codes, packed one by one as the layout is defined; padding is 0."""
    n, k = shape
    spec = QuantSpec(
        bits=bits, group_size=group_size, symmetric=symmetric, in_features=k, out_features=n
    )
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (n, k))
    packed = np.zeros(spec.packed_shape, np.uint16)
    for row, column in np.ndindex(n, k):
        tile, rest = divmod(column, spec.tile_k)
        plane, j = divmod(rest, 32)
        packed[row // 64, tile, row % 64, j] |= codes[row, column] << (bits * plane)
    scale = np.zeros(spec.scale_shape, scale_dtype)
    scale[:, :n] = rng.uniform(0.005, 0.02, (spec.groups, n)).astype(scale_dtype)
    zero_point = np.zeros(spec.scale_shape, np.int8)
    if not symmetric:
        half = 2 ** (bits - 1)
        zero_point[:, :n] = rng.integers(-half, half, (spec.groups, n))
    per_column = [
        np.repeat(a[:, :n], spec.group_size, axis=0).T.astype(np.float64)
        for a in (zero_point, scale)
    ]
    weight = (codes - float(spec.offset) - per_column[0]) * per_column[1]
    return Case(spec, packed, scale, None if symmetric else zero_point, weight)


def _make_x(shape, dtype, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _assert_close(out, x, case: Case):
    """Hold `out` to a bound that follows from the kernel's arithmetic, entry by entry.

    Each product (q - zero) * x is exact in float32 (at most 9 + 11 significant bits). A term then
    passes at most K + 2 float32 roundings (additions, and the product with the scale), so with
    u = 2^-24 the sum before the last rounding is within gamma = (K + 2) u / (1 - (K + 2) u) times
    |x| @ |W|.T of the exact one (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
    Rounding to the output adds at most v = 2^-8 (bfloat16) or 2^-11 (float16) of the result, and in
    float16 half of its smallest subnormal, 2^-25.
    Where groups straddle slabs each weight is rounded to float32 and to the dtype of x beforehand:
    v + u of |x| @ |W|.T more, and in float16 2^-25 of sum |x|.
    """
    spec, dtype = case.spec, x.dtype
    assert out.dtype == dtype
    assert out.shape == (x.shape[0], spec.out_features)
    exact_x = np.asarray(x, np.float64)
    exact = exact_x @ case.weight.T
    magnitude = np.abs(exact_x) @ np.abs(case.weight).T
    u, v, tiny = 2.0**-24, *((2.0**-8, 0.0) if dtype == jnp.bfloat16 else (2.0**-11, 2.0**-25))
    gamma = (spec.in_features + 2) * u / (1 - (spec.in_features + 2) * u)
    error = gamma * magnitude
    if spec.groups > 1 and spec.group_size % 32:
        rounding = (v + 2 * u) * magnitude + tiny * np.abs(exact_x).sum(1, keepdims=True)
        error = error + (1 + gamma) * rounding
    bound = error + v * (np.abs(exact) + error) + tiny
    # a bound that some other computation would meet as well shows nothing
    assert np.median(bound / magnitude) < 2 * v
    worst = np.max(np.abs(np.asarray(out, np.float64) - exact) / bound)
    assert worst <= 1, f"{worst:.3f} times the error that rounding explains"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("shape", "group_size", "tokens", "dtype"),
    [
        ((830, 544), 32, 7, jnp.bfloat16),
        ((70, 192), 64, 17, jnp.float16),
        ((70, 384), 128, 1, jnp.bfloat16),
        ((64, 192), 96, 1, jnp.float16),
        ((40, 768), 256, 7, jnp.bfloat16),
        ((96, 33), -1, 17, jnp.bfloat16),
        ((1, 32), 32, 1, jnp.float16),
        ((63, 100), -1, 65, jnp.float16),
        ((65, 144), 48, 7, jnp.bfloat16),
        ((33, 85), 17, 1, jnp.float16),
        ((33, 99), 33, 17, jnp.bfloat16),
        ((5, 6), 1, 1, jnp.bfloat16),
    ],
)
def test_product_is_within_the_rounding_bound_of_the_exact_one(
    shape, group_size, tokens, dtype, bits
):
    case = _make_case(shape, group_size, bits, symmetric=False)
    x = _make_x((tokens, shape[1]), dtype)
    _assert_close(matmul(x, *case.arrays, case.spec, interpret=True), x, case)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 24, -1])
def test_symmetric_weights_need_no_zero_point(group_size, bits, dtype):
    case = _make_case((20, 96), group_size, bits, symmetric=True)
    assert case.zero_point is None
    x = _make_x((2, 96), dtype)
    _assert_close(matmul(x, *case.arrays, case.spec, interpret=True), x, case)


@pytest.mark.parametrize("scale_dtype", [jnp.float16, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("group_size", [32, 24])
def test_product_with_the_identity_is_the_weight_rounded_once(group_size, dtype, scale_dtype):
    case = _make_case((20, 96), group_size, 4, symmetric=False, scale_dtype=scale_dtype)
    out = matmul(jnp.eye(96, dtype=dtype), *case.arrays, case.spec, interpret=True)
    np.testing.assert_array_equal(out, case.weight.T.astype(np.float32).astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_with_every_zero_point_is_subtracted_exactly(bits, dtype):
    """x picks single weights, so the output is the weight itself: q - zero, at scale 1."""
    count, half = 2**bits, 2 ** (bits - 1)
    codes = np.arange(count)
    spec = QuantSpec(
        bits=bits, group_size=-1, symmetric=False, in_features=count, out_features=count
    )
    # column k holds code k, the same in all rows; row n has zero point n - half
    planes = np.zeros((spec.tiles_k, spec.planes, 32), np.uint16)
    planes.reshape(-1)[:count] = codes
    shifts = np.arange(0, 16, bits, dtype=np.uint16)
    words = np.bitwise_or.reduce(planes << shifts[:, None], axis=1)
    packed = jnp.broadcast_to(words[None, :, None, :], spec.packed_shape)
    zero_point = np.zeros(spec.scale_shape, np.int8)
    zero_point[0, :count] = codes - half
    scale = jnp.ones(spec.scale_shape, jnp.float32)
    x = jnp.eye(count, dtype=dtype)
    out = matmul(x, packed, scale, jnp.asarray(zero_point), spec, interpret=True)
    np.testing.assert_array_equal(np.asarray(out, np.float64), codes[:, None] - codes[None, :])


@pytest.mark.parametrize("group_size", [33, 11])
def test_padding_never_reaches_the_result(group_size):
    case = _make_case((65, 33), group_size, 4, symmetric=False)
    x = _make_x((3, 33), jnp.bfloat16)
    clean = matmul(x, *case.arrays, case.spec, interpret=True)
    packed, scale, zero_point = (np.array(array) for array in case.arrays)
    packed[-1, :, 1:, :] = 0xFFFF  # rows past N
    packed[..., 0] |= 0xFF00  # features past K: planes 2 and 3, and all of plane 1 but its first
    packed[..., 1:] |= 0xFFF0
    scale[:, 65:], zero_point[:, 65:] = np.nan, 127
    arrays = jnp.asarray(packed), jnp.asarray(scale), jnp.asarray(zero_point)
    dirty = matmul(x, *arrays, case.spec, interpret=True)
    np.testing.assert_array_equal(clean, dirty)


def test_padding_past_k_does_not_overflow_where_no_weight_does():
    spec = QuantSpec(bits=4, group_size=24, symmetric=True, in_features=48, out_features=1)
    packed = jnp.full(spec.packed_shape, 0x0098, jnp.uint16)  # q is 0, then 1; -8 past K
    scale = jnp.full(spec.scale_shape, 2.0**15, jnp.float32)  # times -8 it leaves float16
    x = jnp.full((1, 48), 2.0**-10, jnp.float16)
    out = matmul(x, packed, scale, None, spec, interpret=True)
    assert out.item() == 2.0**5 * 16  # of the 48 features, 32 meet a 0


@pytest.mark.parametrize("group_size", [32, 8])
def test_nothing_is_stored_past_the_end_of_the_output(group_size):
    case = _make_case((70, 32), group_size, 4, symmetric=True)
    x = _make_x((5, 32), jnp.bfloat16)

    def write_into_sevens(x_ref, packed_ref, scale_ref, _, out_ref):
        _multiply_tile(x_ref, packed_ref, scale_ref, out_ref, spec=case.spec, block_m=8)

    whole_tiles = jnp.full((8, 128), 7, x.dtype)
    out = pl.pallas_call(
        write_into_sevens,
        out_shape=jax.ShapeDtypeStruct(whole_tiles.shape, x.dtype),
        grid=(1, 2),
        input_output_aliases={3: 0},
        interpret=True,
    )(x, *case.arrays[:2], whole_tiles)
    _assert_close(out[:5, :70], x, case)
    assert (out[5:] == 7).all()
    assert (out[:, 70:] == 7).all()


def test_vmap_over_x_alone_and_over_stacked_weights_equals_a_loop():
    first, second = (_make_case((20, 96), 32, 4, symmetric=False, seed=seed) for seed in (2, 3))
    x = _make_x((2, 5, 96), jnp.bfloat16)

    def multiply(x, packed, scale, zero_point):
        return matmul(x, packed, scale, zero_point, first.spec, interpret=True)

    shared = jax.vmap(multiply, in_axes=(0, None, None, None))(x, *first.arrays)
    np.testing.assert_array_equal(shared, jnp.stack([multiply(row, *first.arrays) for row in x]))
    stacked = jax.tree.map(lambda *pair: jnp.stack(pair), first.arrays, second.arrays)
    each = jax.jit(jax.vmap(multiply))(x, *stacked)
    for out, row, case in zip(each, x, (first, second), strict=True):
        _assert_close(out, row, case)


def test_jit_does_not_change_the_result_and_traces_once():
    case = _make_case((20, 96), 32, 8, symmetric=True)
    traced = []

    @jax.jit
    def multiply(x, packed, scale):
        traced.append(x.shape)
        return matmul(x, packed, scale, None, case.spec, interpret=True)

    for seed in (1, 2):
        x = _make_x((4, 96), jnp.float16, seed)
        _assert_close(multiply(x, case.packed, case.scale), x, case)
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 32), jnp.float32), ((2, 32), jnp.int8), ((0, 32), jnp.bfloat16)]
)
def test_other_activations_are_refused_by_dtype_and_shape(shape, dtype):
    case = _make_case((1, 32), 32, 4, symmetric=True)
    with pytest.raises(BackendError, match=rf"{jnp.dtype(dtype).name} \[{shape[0]}, 32\]"):
        matmul(jnp.zeros(shape, dtype), *case.arrays, case.spec, interpret=True)
