"""What only a GPU can show: the compiled kernels compute what their interpreted twins do.

Run with `python -m pytest -m gpu tests/gpu` on a machine with an NVIDIA GPU; skipped elsewhere.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.format.dequantize import dequantize
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.matmul import quant_matmul, quant_matmul_gated, quant_matmul_many
from pallas_kernels.tiles.dense_rules import fix_schedule, list_candidates
from pallas_kernels.tiles.device import find_device
from pallas_kernels.tiles.tiles import PREFILL, Tiles
from pallas_kernels.triton.dense import expand_by_kernel
from tests.pallas_kernels.products import assert_close, make_weights, make_x

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"),
]

TENSOR_CORE = 8
"""How many times the rounding error of float32 sums the tensor cores may make.

They add 16 products and the sum so far as integers aligned to the largest, cut off below 2^-23 of
it (Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores, 2021). That is at
most 17 cuts of 2^-23 for 16 terms, 2.2 roundings of 2^-24 each, and once more where the compiler
pairs two instructions; the bound leaves room for twice that."""


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1, 16])
def test_the_asm_reads_every_code_with_every_zero_point(bits, dtype, group):
    """x picks single weights, so the output is q - zero itself, at scale 1."""
    count, half = 2**bits, 2 ** (bits - 1)
    k = max(count, 256)
    spec = QuantSpec(
        bits=bits, group_size=group, symmetric=False, in_features=k, out_features=count
    )
    codes = np.arange(k) % count
    planes = np.zeros((spec.tiles_k, spec.planes, 32), np.uint16)
    planes.reshape(-1)[:k] = codes
    shifts = np.arange(0, 16, bits, dtype=np.uint16)
    words = np.bitwise_or.reduce(planes << shifts[:, None], axis=1)
    zero_point = np.zeros(spec.scale_shape, np.int8)
    zero_point[:, :count] = np.arange(count) - half
    weights = {
        "packed": jnp.broadcast_to(words[None, :, None, :], spec.packed_shape),
        "scale": jnp.ones(spec.scale_shape, dtype),
        "zero_point": jnp.asarray(zero_point),
    }
    out = quant_matmul(jnp.eye(k, dtype=dtype), weights, spec, backend="triton")
    expected = codes[:, None] - np.arange(count)[None, :]
    np.testing.assert_array_equal(np.asarray(out, np.float64), expected)
    expanded = expand_by_kernel(weights, spec, dtype)
    np.testing.assert_array_equal(np.asarray(expanded, np.float64), expected.T)


_SHAPES = list(
    itertools.islice(
        itertools.product((1, 7, 8, 9, 63, 64, 65, 1000), (1, 63, 830, 4096), (33, 544, 4096)),
        0,
        None,
        11,
    )
)


@pytest.mark.parametrize(("tokens", "n", "k"), _SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_products_are_within_the_bound(tokens, n, k, bits, dtype):
    group = {33: -1, 544: 32, 4096: 128}[k]
    spec, weights = make_weights(bits, n, k, group, scale_dtype=dtype)
    x = make_x((tokens, k), dtype)
    run = jax.jit(lambda x, w: quant_matmul(x, w, spec, backend="triton"))
    out = run(x, weights)
    assert_close(out, x, weights, spec, exact_scale=True, sums=TENSOR_CORE)
    np.testing.assert_array_equal(out, run(x, weights))


@pytest.mark.parametrize("tokens", [1, 16, 64, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_candidate_of_the_tuner_gives_the_product(tokens, bits):
    spec, weights = make_weights(bits, 830, 2048, 128, scale_dtype=jnp.bfloat16)
    x = make_x((tokens, 2048), jnp.bfloat16)
    candidates = list_candidates(spec, tokens, jnp.bfloat16, jnp.bfloat16, find_device())
    for schedule in candidates[:: max(1, len(candidates) // 8)]:
        with fix_schedule(schedule):
            run = jax.jit(lambda x, w: quant_matmul(x, w, spec, backend="triton"))
            out = run(x, weights)
        assert_close(out, x, weights, spec, exact_scale=True, sums=TENSOR_CORE)


def test_expansion_equals_dequantize_bit_for_bit():
    for bits, group, dtype in itertools.product(
        (4, 8), (16, 32, 128, -1), (jnp.bfloat16, jnp.float16)
    ):
        spec, weights = make_weights(
            bits, 830, 544 if group != 128 else 640, group, scale_dtype=dtype
        )
        out = jax.jit(lambda w, spec=spec, dtype=dtype: expand_by_kernel(w, spec, dtype))(weights)
        np.testing.assert_array_equal(out, dequantize(weights, spec))


@pytest.mark.parametrize("tokens", [1, 16, 33, 200, 2000])
def test_fused_neighbours_equal_the_products_apart(tokens):
    made = [make_weights(4, n, 1024, 128, scale_dtype=jnp.bfloat16, seed=n) for n in (640, 128, 70)]
    specs, weights = zip(*made, strict=True)
    x = make_x((tokens, 1024), jnp.bfloat16)
    tiles = PREFILL if tokens > 1000 else Tiles(block_m=16, block_n=128, block_k=128)
    with fix_schedule(tiles):
        together = jax.jit(lambda x: quant_matmul_many(x, weights, specs, backend="triton"))(x)
        apart = [
            quant_matmul(x, w, s, backend="triton") for w, s in zip(weights, specs, strict=True)
        ]
    for y, alone, weight, spec in zip(together, apart, weights, specs, strict=True):
        np.testing.assert_array_equal(y, alone)
        assert_close(y, x, weight, spec, exact_scale=True, sums=TENSOR_CORE)


@pytest.mark.parametrize("tokens", [1, 16, 64, 2000])
def test_gated_product_is_that_of_the_xla_path(tokens):
    """Both round at the end; in between the XLA path rounds the weight, the kernel at most g and u.

    With |silu'| < 1.1 an error e of g and u, relative to their sums of magnitudes a, gives
    e (1.1 a_g |u| + |g| a_u) and a term in e^2; e is 3 * 2^-8 for three roundings to bfloat16.
    """
    (spec, gate), (_, up) = (
        make_weights(4, 512, 1024, 128, scale_dtype=jnp.bfloat16, seed=seed) for seed in (1, 2)
    )
    x = make_x((tokens, 1024), jnp.bfloat16)
    run = jax.jit(lambda x, g, u: quant_matmul_gated(x, g, u, spec, spec))
    out = np.asarray(run(x, gate, up), np.float64)
    exact_x = np.asarray(x, np.float64)
    wg, wu = (np.asarray(dequantize(w, spec), np.float64) for w in (gate, up))
    g, u = exact_x @ wg.T, exact_x @ wu.T
    ag, au = (np.abs(exact_x) @ np.abs(w).T for w in (wg, wu))
    e = 3 * 2.0**-8
    exact = g / (1 + np.exp(-g)) * u
    bound = e * (1.1 * ag * np.abs(u) + np.abs(g) * au + 1.1 * e * ag * au)
    assert (np.abs(out - exact) <= bound + 2.0**-8 * (np.abs(exact) + bound)).all()


def test_vmap_scan_and_gradient_run_on_the_gpu():
    spec, weights = make_weights(4, 256, 256, 64, scale_dtype=jnp.bfloat16)
    x = make_x((3, 5, 256), jnp.bfloat16)
    multiply = jax.jit(jax.vmap(lambda x: quant_matmul(x, weights, spec)))
    for rows, out in zip(x, multiply(x), strict=True):
        assert_close(out, rows, weights, spec, exact_scale=True, sums=TENSOR_CORE)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), weights)
    each = jax.jit(jax.vmap(lambda x, w: quant_matmul(x, w, spec)))(x, stacked)
    for rows, out in zip(x, each, strict=True):
        assert_close(out, rows, weights, spec, exact_scale=True, sums=TENSOR_CORE)
    gradient = jax.jit(jax.grad(lambda x: quant_matmul(x, weights, spec).astype(jnp.float32).sum()))
    column_sums = np.asarray(dequantize(weights, spec), np.float64).sum(0)
    scale = np.abs(np.asarray(dequantize(weights, spec), np.float64)).sum(0)
    error = np.abs(np.asarray(gradient(x[0]), np.float64) - column_sums)
    assert (error <= 3 * 2.0**-8 * scale).all()
