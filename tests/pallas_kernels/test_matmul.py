"""`quant_matmul` on every backend, under every transformation, against the exact product."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh

from loaders.repack import pack
from pallas_kernels.dequantize import dequantize
from pallas_kernels.errors import BackendError, SpecError
from pallas_kernels.matmul import explain, quant_matmul
from pallas_kernels.spec import QuantSpec
from tests.folders import make_tensors

X_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
UNIT = {jnp.float32: 2.0**-24, jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11}


def _make(bits=4, n=40, k=96, group=32, *, symmetric=False, scale_dtype=np.float32, seed=0):
    spec = QuantSpec(
        bits=bits, group_size=group, symmetric=symmetric, in_features=k, out_features=n
    )
    return spec, pack(make_tensors(spec, scale_dtype=scale_dtype, seed=seed), spec)


def _make_x(shape, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _assert_close(out, x, weights, spec, *, exact_scale=False, bias=None):
    """Hold `out` [M, N] to a bound that follows from the arithmetic, entry by entry.

    Reference: float64 on the weight that `dequantize` gives, W (rounded to the scale's dtype as
    compressed-tensors rounds it). Let u = 2^-24, v the unit roundoff of x's dtype (2^-24, 2^-8,
    2^-11), a = |x| @ |W|.T.
    * XLA casts W to x's dtype: v a (0 in float32, which holds every W; in float16 also half its
      smallest subnormal per weight, 2^-25 sum |x|).
    * A float32 sum of K products in any order: gamma a with gamma = K' u / (1 - K' u), K' = K + 64
      (the padding of a tile may be added) (Higham, Accuracy and Stability, 3.1).
    * `exact_scale`: the Triton kernel does not round W to the scale's dtype, which is one more
      relative error 2^-8 (bfloat16 scales) of W, for 2^-8 a.
    * The result, and once more with a bias, is rounded to x's dtype: v |y| and 2^-25 in float16.
    """
    u, v = 2.0**-24, UNIT[x.dtype.type]
    tiny = 2.0**-25 if x.dtype == jnp.float16 else 0.0
    w, exact_x = np.asarray(dequantize(weights, spec), np.float64), np.asarray(x, np.float64)
    y, magnitude = exact_x @ w.T, np.abs(exact_x) @ np.abs(w).T
    gamma = (spec.in_features + 64) * u / (1 - (spec.in_features + 64) * u)
    narrow = 0.0 if x.dtype == jnp.float32 else v
    weight_error = narrow + (2.0**-8 if exact_scale else 0.0)
    error = (weight_error + gamma) * (1 + gamma) * magnitude
    error = error + tiny * (1 + np.abs(exact_x).sum(1, keepdims=True))
    error = error + v * (np.abs(y) + error)
    if bias is not None:
        y = y + np.asarray(bias, np.float64)
        error = error + (u + v) * (np.abs(y) + error) + tiny
    assert out.dtype == x.dtype
    assert out.shape == y.shape
    worst = np.max(np.abs(np.asarray(out, np.float64) - y) / error, initial=0.0)
    assert worst <= 1, f"{worst:.3f} times the error that rounding explains"


@pytest.mark.parametrize("tokens", [0, 1, 7, 65])
@pytest.mark.parametrize(
    ("bits", "shape", "x_dtype", "scale_dtype"),
    [
        (4, (830, 544, 32), jnp.float32, jnp.bfloat16),
        (8, (96, 33, -1), jnp.float32, jnp.float32),
        (4, (33, 85, 17), jnp.bfloat16, jnp.bfloat16),
        (8, (70, 192, 64), jnp.float16, jnp.float16),
        (4, (65, 384, 128), jnp.bfloat16, jnp.float32),
        (4, (1, 32, 32), jnp.float16, jnp.bfloat16),
        (8, (7, 100, -1), jnp.bfloat16, jnp.float16),
    ],
)
def test_product_is_within_the_rounding_bound(bits, shape, x_dtype, scale_dtype, tokens):
    spec, weights = _make(bits, *shape, symmetric=tokens == 7, scale_dtype=scale_dtype)
    x = _make_x((tokens, spec.in_features), x_dtype)
    _assert_close(quant_matmul(x, weights, spec), x, weights, spec)


@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("bits", "shape"), [(4, (70, 192, 64)), (8, (20, 33, -1))])
def test_named_backends_agree_within_the_bound(bits, shape, x_dtype):
    spec, weights = _make(bits, *shape, scale_dtype=jnp.bfloat16)
    x = _make_x((3, spec.in_features), x_dtype)
    _assert_close(quant_matmul(x, weights, spec, backend="xla"), x, weights, spec)
    interpreted = quant_matmul(x, weights, spec, backend="triton")
    _assert_close(interpreted, x, weights, spec, exact_scale=True)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 0), (1, 1, 4)])
def test_leading_dimensions_are_kept_and_bias_is_added(lead):
    spec, weights = _make()
    bias = _make_x((40,), seed=2)
    x = _make_x((*lead, 96), jnp.float16)
    out = quant_matmul(x, weights | {"bias": bias}, spec)
    assert out.shape == (*lead, 40)
    rows = x.reshape(-1, 96)
    _assert_close(out.reshape(-1, 40), rows, weights, spec, bias=bias)


@pytest.mark.parametrize("backend", ["xla", "triton", None])
def test_jit_and_vmap_over_x_and_over_stacked_weights(backend):
    spec, first = _make(scale_dtype=jnp.bfloat16)
    second = _make(scale_dtype=jnp.bfloat16, seed=5)[1]
    x = _make_x((2, 3, 96), jnp.bfloat16)

    def multiply(x, weights):
        return quant_matmul(x, weights, spec, backend=backend)

    exact = backend == "triton"
    shared = jax.jit(jax.vmap(multiply, in_axes=(0, None)))(x, first)
    for out, rows in zip(shared, x, strict=True):
        _assert_close(out, rows, first, spec, exact_scale=exact)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    each = jax.vmap(multiply)(x, stacked)
    for out, rows, weights in zip(each, x, (first, second), strict=True):
        _assert_close(out, rows, weights, spec, exact_scale=exact)


def test_scan_over_stacked_weights_is_the_loop():
    spec, first = _make(n=96)
    layers = [first, _make(n=96, seed=5)[1], _make(n=96, seed=6)[1]]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = _make_x((2, 96))
    out, inputs = jax.jit(
        lambda x: lax.scan(lambda x, w: (quant_matmul(x, w, spec) / 4, x), x, stacked)
    )(x)
    outputs = [*inputs[1:], out]
    for rows, result, weights in zip(inputs, outputs, layers, strict=True):
        _assert_close(result * 4, rows, weights, spec)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("backend", ["xla", "triton", None])
@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_gradients_are_those_of_the_dense_product(scale_dtype, backend, tokens):
    """For L = sum y * c: dL/dx = c @ W, dL/dbias = sum c, dL/dscale = sum (q - z) c.T @ x.

    c and x are small integers, exact in every dtype. A bound as in `_assert_close`: the cotangents
    pass at most four roundings to 16 bits (W to the dtype of x, the cotangent of W to x's and to
    the scale's dtype, and the result), 4 * 2^-8 of the sum of magnitudes; float32 sums add less
    than 2^-14 of it.
    """
    spec, weights = _make(scale_dtype=scale_dtype, n=40)
    rng = np.random.default_rng(3)
    dtype = jnp.float32 if backend != "triton" else jnp.bfloat16
    x, c = (jnp.asarray(rng.integers(-4, 5, (tokens, size)), dtype) for size in (96, 40))
    bias = jnp.zeros(40, jnp.float32)

    def loss(x, scale, bias):
        y = quant_matmul(x, weights | {"scale": scale, "bias": bias}, spec, backend=backend)
        return (y.astype(jnp.float32) * c.astype(jnp.float32)).sum()

    dx, dscale, dbias = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, weights["scale"], bias)
    w, exact_x, exact_c = (np.asarray(a, np.float64) for a in (dequantize(weights, spec), x, c))
    units = {k: a for k, a in weights.items() if k != "scale"}
    ones = jnp.ones(spec.scale_shape, jnp.float32)
    q = np.asarray(dequantize(units | {"scale": ones}, spec), np.float64)

    def per_group(per_weight):
        return per_weight.reshape(40, spec.groups, 32).sum(2).T

    def check(found, expected, magnitude):
        bound = (4 * 2.0**-8 + 2.0**-14) * magnitude + 1e-30
        assert (np.abs(np.asarray(found, np.float64) - expected) <= bound).all()

    assert (dx.dtype, dscale.dtype, dbias.dtype) == (x.dtype, scale_dtype, bias.dtype)
    check(dx, exact_c @ w, np.abs(exact_c) @ np.abs(w))
    outer = exact_c.T @ exact_x
    check(
        dscale[:, :40],
        per_group(q * outer),
        per_group(np.abs(q) * (np.abs(exact_c).T @ np.abs(exact_x))),
    )
    np.testing.assert_array_equal(dscale[:, 40:], 0)
    np.testing.assert_array_equal(dbias, exact_c.sum(0))


def test_gradient_leaves_integers_alone():
    spec, weights = _make()
    gradient = jax.grad(lambda w: quant_matmul(_make_x((2, 96)), w, spec).sum(), allow_int=True)
    assert gradient(weights)["packed"].dtype == jax.dtypes.float0


def test_lowering_decides_the_backend_and_needs_no_gpu():
    spec, weights = _make(n=64, k=128)
    x = _make_x((4, 128), jnp.bfloat16)
    # since jax 0.11 Pallas-Triton asks the mesh which GPU it lowers for, and warns of its end
    gpu = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100", 132, "cuda"))
    with jax.sharding.use_abstract_mesh(gpu), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Triton.*", DeprecationWarning)
        traced = jax.jit(lambda x: quant_matmul(x, weights, spec)).trace(x)
        for_gpu = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in for_gpu
    assert "stablehlo.dot_general" not in for_gpu
    for_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "triton" not in for_cpu
    assert "stablehlo.dot_general" in for_cpu


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_expanded_weight_outlives_its_use_in_a_loop(dtype, tokens):
    """Four weights of [N, K]: expanded in float32 they are 16 NK bytes, one is 4 NK.

    A loop may hold one expansion, its cast to the dtype of x, and a copy of one in another order.
    """
    spec, weights = _make(n=512, k=512, scale_dtype=jnp.bfloat16)
    layers = [jax.tree.map(lambda a, i=i: a + i, weights) for i in range(4)]

    def decode(x, layers):
        def step(_, x):
            for layer in layers:
                x = quant_matmul(x, layer, spec)
            return x / 100

        return lax.fori_loop(0, 10, step, x)

    compiled = jax.jit(decode).lower(_make_x((tokens, 512), dtype), layers).compile()
    expanded = 4 * 512 * 512
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * expanded


def test_stacked_rows_share_one_expanded_weight():
    """With vmap over x alone, eight expansions would be 32 NK bytes; one and a copy are 8 NK."""
    spec, weights = _make(n=512, k=512)
    multiply = jax.jit(jax.vmap(lambda x: quant_matmul(x, weights, spec)))
    compiled = multiply.lower(_make_x((8, 1, 512))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * 4 * 512 * 512


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((2, 96), np.int32), "x must be float32, bfloat16 or float16, got int32"),
        (np.ones((2, 96), jnp.float8_e4m3fn), "got float8_e4m3fn"),
        (np.ones((2, 95), np.float32), r"x must be \[..., 96\], got \[2, 95\]"),
        (np.float32(1), r"x must be \[..., 96\], got \[\]"),
    ],
)
def test_x_that_does_not_fit_is_refused(x, message):
    spec, weights = _make()
    with pytest.raises(SpecError, match=message):
        quant_matmul(x, weights, spec)


def test_weights_of_another_spec_are_refused():
    _, weights = _make()
    other, _ = _make(n=80, symmetric=True)
    with pytest.raises(SpecError) as caught:
        quant_matmul(_make_x((2, 96)), weights, other)
    assert "packed has shape [1, 1, 64, 32], expected [2, 1, 64, 32]" in str(caught.value)
    assert "zero_point is not expected in a symmetric weight" in str(caught.value)


def test_named_backend_is_that_one_or_an_error():
    spec, weights = _make()
    with pytest.raises(BackendError, match=r"None or one of .*got 'cuda'"):
        quant_matmul(_make_x((2, 96)), weights, spec, backend="cuda")
    with pytest.raises(BackendError, match=r'"triton" multiplies .* x is float32: cast x, or use'):
        quant_matmul(_make_x((2, 96)), weights, spec, backend="triton")


@pytest.mark.parametrize(
    ("platform", "dtype", "backend", "choice"),
    [
        ("cpu", jnp.bfloat16, None, "xla"),
        (None, jnp.bfloat16, None, "xla"),
        ("cuda", jnp.bfloat16, None, "triton"),
        ("cuda", "float16", None, "triton"),
        ("cuda", np.dtype(np.float16), None, "triton"),
        ("cuda", jnp.float32, None, "xla"),
        ("cuda", jnp.bfloat16, "xla", "xla"),
        ("rocm", jnp.bfloat16, None, "xla"),
        ("tpu", jnp.bfloat16, None, "xla"),
        ("cpu", jnp.bfloat16, "triton", "triton"),
    ],
)
def test_explain_names_the_backend_and_gives_a_reason(platform, dtype, backend, choice):
    explained = explain(_make()[0], dtype, platform=platform, backend=backend)
    assert explained.backend == choice
    assert explained.reason


@pytest.mark.parametrize(
    ("error", "platform", "dtype", "backend", "message"),
    [
        (BackendError, "tpu", jnp.bfloat16, "triton", "not on tpu"),
        (BackendError, "cuda", jnp.float32, "triton", "x is float32"),
        (BackendError, "gpu", jnp.bfloat16, None, "platform must be None or one of .* got 'gpu'"),
        (BackendError, "cuda", jnp.bfloat16, "cutlass", "got 'cutlass'"),
        (SpecError, "cuda", jnp.int8, None, "got int8"),
    ],
)
def test_explain_refuses_what_cannot_run(error, platform, dtype, backend, message):
    with pytest.raises(error, match=message):
        explain(_make()[0], dtype, platform=platform, backend=backend)
