"""The Triton kernels in interpret mode against the exact product in float64."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.errors import BackendError
from pallas_kernels.format.dequantize import dequantize
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.tiles.tiles import Tiles
from pallas_kernels.triton.dense import expand_by_kernel, multiply_packed
from tests.grids import cover, sample
from tests.pallas_kernels.exact import Case, assert_exact, make_case
from tests.pallas_kernels.products import make_x


def _tiles(spec: QuantSpec, **changes) -> Tiles:
    return Tiles(**{"block_m": 8, "block_n": 128, "block_k": spec.tile_k, **changes})


@functools.partial(jax.jit, static_argnames=("spec", "tiles"))
def _run(x, weights, spec, tiles):
    """An interpreted kernel is compiled again by every call outside of jit."""
    [out] = multiply_packed(x, [weights], [spec], tiles, interpret=True)
    return out


def _multiply(x, case: Case, **changes):
    return _run(x, case.weights, case.spec, _tiles(case.spec, **changes))


@pytest.mark.parametrize(
    ("shape", "group_size", "tokens", "dtype", "bits"),
    cover(
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
        [4, 8],
    ),
)
def test_product_is_within_the_rounding_bound_of_the_exact_one(
    shape, group_size, tokens, dtype, bits
):
    case = make_case(shape, group_size, bits, symmetric=False)
    x = make_x((tokens, shape[1]), dtype)
    assert_exact(_multiply(x, case), x, case)


@pytest.mark.parametrize(
    ("bits", "shape", "group_size", "scale_on", "changes"),
    sample(
        [
            (4, (200, 672), 32, "sum", {"block_m": 16, "block_n": 256}),
            (4, (130, 640), 128, "sum", {"block_m": 32, "splits": 3}),
            (4, (130, 640), 640, "sum", {"block_m": 64, "block_n": 64, "splits": 2}),
            (4, (130, 640), 128, "weight", {"block_m": 128}),
            (4, (200, 672), 32, "weight", {"steps": 2, "splits": 4}),
            (4, (200, 672), 96, "sum", {"steps": 2, "splits": 3}),
            (4, (130, 672), 672, "weight", {"block_m": 32, "splits": 2}),
            (8, (200, 672), 32, "sum", {"block_m": 16, "block_n": 256}),
            (8, (130, 640), 128, "sum", {"steps": 2, "splits": 4}),
            (8, (130, 640), 64, "weight", {"steps": 4, "block_n": 64}),
            (8, (130, 672), 672, "sum", {"block_m": 64, "splits": 5}),
        ],
        every=2,
    ),
)
def test_every_tile_shape_gives_the_product(bits, shape, group_size, scale_on, changes):
    """672 is no multiple of a packed tile, and of no step: the last one passes the end of K."""
    case = make_case(shape, group_size, bits, symmetric=False)
    changes = dict(changes)
    changes["block_k"] = case.spec.tile_k * changes.pop("steps", 1)
    x = make_x((9, shape[1]), jnp.bfloat16)
    out = _multiply(x, case, scale_on=scale_on, **changes)
    splits = changes.get("splits", 1)
    assert_exact(out, x, case, splits=splits, scale_on=scale_on)
    again = _multiply(x, case, scale_on=scale_on, **changes)
    np.testing.assert_array_equal(out, again)


@pytest.mark.parametrize(
    ("group_size", "bits", "dtype"), cover([32, 24, -1], [4, 8], [jnp.bfloat16, jnp.float16])
)
def test_symmetric_weights_need_no_zero_point(group_size, bits, dtype):
    case = make_case((20, 96), group_size, bits, symmetric=True)
    assert case.zero_point is None
    x = make_x((2, 96), dtype)
    assert_exact(_multiply(x, case), x, case)


@pytest.mark.parametrize(
    ("group_size", "dtype", "scale_dtype"),
    sample(
        itertools.product((32, 24), (jnp.float16, jnp.bfloat16), (jnp.float16, jnp.float32)),
        every=3,
    ),
)
def test_product_with_the_identity_is_the_weight_rounded_once(group_size, dtype, scale_dtype):
    case = make_case((20, 96), group_size, 4, symmetric=False, scale_dtype=scale_dtype)
    out = _multiply(jnp.eye(96, dtype=dtype), case)
    np.testing.assert_array_equal(out, case.weight.T.astype(np.float32).astype(dtype))


@pytest.mark.parametrize(("bits", "dtype"), cover([4, 8], [jnp.float16, jnp.bfloat16]))
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
    weights = {"packed": packed, "scale": scale, "zero_point": jnp.asarray(zero_point)}
    [out] = multiply_packed(x, [weights], [spec], _tiles(spec), interpret=True)
    np.testing.assert_array_equal(np.asarray(out, np.float64), codes[:, None] - codes[None, :])


@pytest.mark.parametrize("group_size", [33, 11])
def test_padding_never_reaches_the_result(group_size):
    case = make_case((65, 33), group_size, 4, symmetric=False)
    x = make_x((3, 33), jnp.bfloat16)
    clean = _multiply(x, case)
    dirtied = {name: np.array(leaf) for name, leaf in case.weights.items()}
    packed, scale, zero_point = (dirtied[n] for n in ("packed", "scale", "zero_point"))
    packed[-1, :, 1:, :] = 0xFFFF  # rows past N
    packed[..., 0] |= 0xFF00  # features past K: planes 2 and 3, and all of plane 1 but its first
    packed[..., 1:] |= 0xFFF0
    scale[:, 65:], zero_point[:, 65:] = np.nan, 127
    weights = {name: jnp.asarray(leaf) for name, leaf in dirtied.items()}
    dirty = _run(x, weights, case.spec, _tiles(case.spec))
    np.testing.assert_array_equal(clean, dirty)


def test_padding_past_k_does_not_overflow_where_no_weight_does():
    spec = QuantSpec(bits=4, group_size=24, symmetric=True, in_features=48, out_features=1)
    packed = jnp.full(spec.packed_shape, 0x0098, jnp.uint16)  # q is 0, then 1; -8 past K
    scale = jnp.full(spec.scale_shape, 2.0**15, jnp.float32)  # times -8 it leaves float16
    x = jnp.full((1, 48), 2.0**-10, jnp.float16)
    weights = {"packed": packed, "scale": scale}
    [out] = multiply_packed(x, [weights], [spec], _tiles(spec), interpret=True)
    assert out.item() == 2.0**5 * 16  # of the 48 features, 32 meet a 0


@pytest.mark.parametrize("splits", [1, 2])
def test_nothing_is_stored_past_the_end_of_the_output(splits, monkeypatch):
    """The kernel runs on an output with room past its end, filled with sevens."""
    case = make_case((70, 256), 32, 4, symmetric=True)
    x = make_x((5, 256), jnp.bfloat16)
    tiles = _tiles(case.spec, splits=splits)
    call = pl.pallas_call

    def call_with_room(kernel, *, out_shape, **options):
        [shape] = out_shape
        room = jax.ShapeDtypeStruct((*shape.shape[:-2], 8, 128), shape.dtype)

        def write_into_sevens(x_ref, weights, _, out_ref):
            kernel(x_ref, weights, out_ref)

        def run(x, weights):
            index = 1 + len(jax.tree.leaves(weights))
            full = call(
                write_into_sevens,
                out_shape=room,
                input_output_aliases={index: 0},
                **options,
            )(x, weights, jnp.full(room.shape, 7, room.dtype))
            assert (full[..., 5:, :] == 7).all()
            assert (full[..., 70:] == 7).all()
            return [full[..., :5, :70]]

        return run

    monkeypatch.setattr(pl, "pallas_call", call_with_room)
    [out] = multiply_packed(x, [case.weights], [case.spec], tiles, interpret=True)
    assert_exact(out, x, case, splits=splits)


def test_vmap_over_x_alone_and_over_stacked_weights_equals_a_loop():
    first, second = (make_case((20, 96), 32, 4, symmetric=False, seed=seed) for seed in (2, 3))
    x = make_x((2, 5, 96), jnp.bfloat16)

    def run(x, weights):
        return _run(x, weights, first.spec, _tiles(first.spec))

    shared = jax.vmap(run, in_axes=(0, None))(x, first.weights)
    np.testing.assert_array_equal(shared, jnp.stack([run(row, first.weights) for row in x]))
    stacked = jax.tree.map(lambda *pair: jnp.stack(pair), first.weights, second.weights)
    each = jax.vmap(run)(x, stacked)
    for out, row, case in zip(each, x, (first, second), strict=True):
        assert_exact(out, row, case)


def test_jit_does_not_change_the_result_and_traces_once():
    case = make_case((20, 96), 32, 8, symmetric=True)
    traced = []

    @jax.jit
    def run(x):
        traced.append(x.shape)
        return _multiply(x, case)

    for seed in (1, 2):
        x = make_x((4, 96), jnp.float16, seed)
        assert_exact(run(x), x, case)
    assert len(traced) == 1


@pytest.mark.parametrize(("tokens", "splits"), cover([3, 40], [1, 2]))
def test_weights_that_share_x_are_one_kernel_and_each_its_own_product(tokens, splits):
    cases = [
        make_case((n, 256), 64, 4, symmetric=False, seed=n, scale_dtype=jnp.float32)
        for n in (200, 8, 64)
    ]
    x = make_x((tokens, 256), jnp.bfloat16)
    tiles = _tiles(cases[0].spec, block_m=8 if tokens < 8 else 64, splits=splits)

    def run(x):
        weights, specs = [case.weights for case in cases], [case.spec for case in cases]
        return multiply_packed(x, weights, specs, tiles, interpret=True)

    assert str(jax.make_jaxpr(run)(x)).count("pallas_call[") == 1
    for out, case in zip(run(x), cases, strict=True):
        assert_exact(out, x, case, splits=splits)


@pytest.mark.parametrize(
    ("tokens", "splits", "dtype", "activation"),
    cover(
        [(3, 1), (3, 2), (40, 1)],
        [jnp.bfloat16, jnp.float16],
        ["silu", "silu", "gelu_tanh", "gelu_tanh"],
    ),
)
def test_gated_product_is_within_its_bound(tokens, splits, dtype, activation):
    """y = act(g) u. |act'| < 1.13 and |act(g)| <= |g|, so errors dg and du of the two sums give
    at most 1.13 dg |u| + |g| du + 1.13 dg du; float32 evaluates it within 16 u of |g| (exp or tanh
    within 2 ulp, their argument and three more operations). The result is rounded once; past 32
    tokens g and u are rounded to the dtype of x as well."""
    gate, up = (make_case((70, 256), 64, 4, symmetric=False, seed=seed) for seed in (1, 2))
    x = make_x((tokens, 256), dtype)
    tiles = _tiles(gate.spec, block_m=8 if tokens < 8 else 64, splits=splits)
    weights = [case.weights | {"bias": make_x((70,), jnp.float32, 7)} for case in (gate, up)]
    specs = [gate.spec, up.spec]
    [out] = multiply_packed(x, weights, specs, tiles, activation=activation, interpret=True)
    exact_x, bias = np.asarray(x, np.float64), np.asarray(weights[0]["bias"], np.float64)
    g, u = (exact_x @ case.weight.T + bias for case in (gate, up))
    rounding = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-11
    count = (256 + 4 + splits) * 2.0**-24
    dg, du = (
        count * (np.abs(exact_x) @ np.abs(case.weight).T + np.abs(bias))
        + (rounding * np.abs(total) if tokens > 32 else 0)
        for case, total in ((gate, g), (up, u))
    )
    exact = _activate(activation, g) * u
    error = 1.13 * dg * (np.abs(u) + du) + np.abs(g) * du + 16 * 2.0**-24 * np.abs(g * u)
    bound = error + rounding * (np.abs(exact) + error) + 2.0**-25
    assert (np.abs(np.asarray(out, np.float64) - exact) <= bound).all()
    # the bound tells gate from up, and one activation from the other
    other = {"silu": "gelu_tanh", "gelu_tanh": "silu"}[activation]
    for wrong in (_activate(activation, u) * g, _activate(other, g) * u):
        assert (np.abs(wrong - exact) > bound).mean() > 0.5


def _activate(name: str, g: np.ndarray) -> np.ndarray:
    """In float64."""
    if name == "silu":
        return g / (1 + np.exp(-g))
    return g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))


@pytest.mark.parametrize(
    ("shape", "group_size", "symmetric", "bits", "dtype"),
    sample(
        [
            (*shape, symmetric, bits, dtype)
            for shape in (
                ((70, 544), 32),
                ((64, 256), -1),
                ((3, 100), -1),
                ((65, 99), 33),
                ((5, 6), 1),
            )
            for symmetric in (True, False)
            for bits in (4, 8)
            for dtype in (jnp.bfloat16, jnp.float16)
        ],
        every=7,
    ),
)
def test_expansion_is_the_weight_rounded_once(shape, group_size, dtype, bits, symmetric):
    """With scales of that dtype it is what `dequantize` gives, as compressed-tensors rounds."""
    case = make_case(shape, group_size, bits, symmetric=symmetric, scale_dtype=dtype)
    out = expand_by_kernel(case.weights, case.spec, dtype, interpret=True)
    np.testing.assert_array_equal(out, case.weight.astype(np.float32).astype(dtype))
    np.testing.assert_array_equal(out, dequantize(case.weights, case.spec))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 32), jnp.float32), ((2, 32), jnp.int8), ((0, 32), jnp.bfloat16)]
)
def test_other_activations_are_refused_by_dtype_and_shape(shape, dtype):
    case = make_case((1, 32), 32, 4, symmetric=True)
    with pytest.raises(BackendError, match=rf"{jnp.dtype(dtype).name} \[{shape[0]}, 32\]"):
        _multiply(jnp.zeros(shape, dtype), case)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_m": 12}, "block_m must be one of"),
        ({"block_k": 96}, "block_k must be a multiple of 128"),
        ({"splits": 0}, "splits must be a positive integer"),
        ({"scale_on": "x"}, "scale_on"),
        ({"warps": 3}, "warps"),
    ],
)
def test_impossible_tiles_are_refused_before_the_kernel(changes, message):
    case = make_case((1, 32), 32, 4, symmetric=True)
    with pytest.raises(BackendError, match=message):
        _multiply(make_x((1, 32), jnp.bfloat16), case, **changes)


def test_scale_on_the_weight_needs_scales_of_the_dtype_of_x():
    case = make_case((1, 64), 32, 4, symmetric=True, scale_dtype=jnp.float32)
    with pytest.raises(BackendError, match="float32"):
        _multiply(make_x((1, 64), jnp.bfloat16), case, scale_on="weight")
