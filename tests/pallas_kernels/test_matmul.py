"""`quant_matmul` on every backend, under every transformation, against the exact product."""

from __future__ import annotations

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.backends import explain
from pallas_kernels.errors import BackendError, SpecError
from pallas_kernels.format.dequantize import dequantize
from pallas_kernels.matmul import quant_matmul, quant_matmul_gated, quant_matmul_many
from tests.grids import cover, sample
from tests.pallas_kernels.products import assert_close, make_weights, make_x

X_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@pytest.mark.parametrize(
    ("bits", "shape", "x_dtype", "scale_dtype", "tokens"),
    sample(
        [
            (*case, tokens)
            for case in (
                (4, (830, 544, 32), jnp.float32, jnp.bfloat16),
                (8, (96, 33, -1), jnp.float32, jnp.float32),
                (4, (33, 85, 17), jnp.bfloat16, jnp.bfloat16),
                (8, (70, 192, 64), jnp.float16, jnp.float16),
                (4, (65, 384, 128), jnp.bfloat16, jnp.float32),
                (4, (1, 32, 32), jnp.float16, jnp.bfloat16),
                (8, (7, 100, -1), jnp.bfloat16, jnp.float16),
            )
            for tokens in (0, 1, 7, 65)
        ],
        every=6,
    ),
)
def test_product_is_within_the_rounding_bound(bits, shape, x_dtype, scale_dtype, tokens):
    spec, weights = make_weights(bits, *shape, symmetric=tokens == 7, scale_dtype=scale_dtype)
    x = make_x((tokens, spec.in_features), x_dtype)
    assert_close(quant_matmul(x, weights, spec), x, weights, spec)


@pytest.mark.parametrize(
    ("bits", "shape", "x_dtype"),
    cover([(4, (70, 192, 64)), (8, (20, 33, -1))], [jnp.bfloat16, jnp.float16]),
)
def test_named_backends_agree_within_the_bound(bits, shape, x_dtype):
    spec, weights = make_weights(bits, *shape, scale_dtype=jnp.bfloat16)
    x = make_x((3, spec.in_features), x_dtype)
    assert_close(quant_matmul(x, weights, spec, backend="xla"), x, weights, spec)
    interpreted = quant_matmul(x, weights, spec, backend="triton")
    assert_close(interpreted, x, weights, spec, exact_scale=True)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 0), (1, 1, 4)])
def test_leading_dimensions_are_kept_and_bias_is_added(lead):
    spec, weights = make_weights()
    bias = make_x((40,), seed=2)
    x = make_x((*lead, 96), jnp.float16)
    out = quant_matmul(x, weights | {"bias": bias}, spec)
    assert out.shape == (*lead, 40)
    rows = x.reshape(-1, 96)
    assert_close(out.reshape(-1, 40), rows, weights, spec, bias=bias)


@pytest.mark.parametrize("backend", ["xla", "triton", None])
def test_jit_and_vmap_over_x_and_over_stacked_weights(backend):
    spec, first = make_weights(scale_dtype=jnp.bfloat16)
    second = make_weights(scale_dtype=jnp.bfloat16, seed=5)[1]
    x = make_x((2, 3, 96), jnp.bfloat16)

    def multiply(x, weights):
        return quant_matmul(x, weights, spec, backend=backend)

    exact = backend == "triton"
    shared = jax.jit(jax.vmap(multiply, in_axes=(0, None)))(x, first)
    for out, rows in zip(shared, x, strict=True):
        assert_close(out, rows, first, spec, exact_scale=exact)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    each = jax.jit(jax.vmap(multiply))(x, stacked)
    for out, rows, weights in zip(each, x, (first, second), strict=True):
        assert_close(out, rows, weights, spec, exact_scale=exact)


def test_scan_over_stacked_weights_is_the_loop():
    spec, first = make_weights(n=96)
    layers = [first, make_weights(n=96, seed=5)[1], make_weights(n=96, seed=6)[1]]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = make_x((2, 96))
    out, inputs = jax.jit(
        lambda x: lax.scan(lambda x, w: (quant_matmul(x, w, spec) / 4, x), x, stacked)
    )(x)
    outputs = [*inputs[1:], out]
    for rows, result, weights in zip(inputs, outputs, layers, strict=True):
        assert_close(result * 4, rows, weights, spec)


@pytest.mark.parametrize(
    ("tokens", "scale_dtype", "backend"),
    sample(itertools.product((1, 3), X_DTYPES, ("xla", "triton", None)), every=4),
)
def test_gradients_are_those_of_the_dense_product(scale_dtype, backend, tokens):
    """For L = sum y * c: dL/dx = c @ W, dL/dbias = sum c, dL/dscale = sum (q - z) c.T @ x.

    c and x are small integers, exact in every dtype. A bound as in `assert_close`: the cotangents
    pass at most four roundings to 16 bits (W to the dtype of x, the cotangent of W to x's and to
    the scale's dtype, and the result), 4 * 2^-8 of the sum of magnitudes; float32 sums add less
    than 2^-14 of it.
    """
    spec, weights = make_weights(scale_dtype=scale_dtype, n=40)
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


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_reordered_input_features_are_taken_from_their_places(backend):
    """With perm, column i of the packed weight belongs to input feature perm[i]."""
    spec, weights = make_weights(scale_dtype=jnp.bfloat16)
    perm = jnp.asarray(np.random.default_rng(4).permutation(96), jnp.int32)
    x = make_x((2, 3, 96), jnp.bfloat16)
    shuffled = jnp.zeros_like(x).at[..., perm].set(x)
    out = quant_matmul(shuffled, weights | {"perm": perm}, spec, backend=backend)
    np.testing.assert_array_equal(out, quant_matmul(x, weights, spec, backend=backend))
    assert not np.array_equal(out, quant_matmul(shuffled, weights, spec, backend=backend))
    with pytest.raises(SpecError, match=r"perm has shape \[95\], expected \[96\]"):
        quant_matmul(x, weights | {"perm": perm[1:]}, spec)


@pytest.mark.parametrize("backend", sample(["xla", "triton"], every=2))
def test_weights_of_any_specs_share_x_in_one_call_each_for_equal_specs(backend):
    made = [
        make_weights(n=40, scale_dtype=jnp.bfloat16),
        make_weights(bits=8, n=7, scale_dtype=jnp.float16),
        make_weights(n=130, scale_dtype=jnp.bfloat16, seed=3),
        make_weights(n=20, group=48, symmetric=True, scale_dtype=jnp.bfloat16),
    ]
    specs, weights = zip(*made, strict=True)
    weights[2]["bias"] = make_x((130,))
    x = make_x((2, 5, 96), jnp.bfloat16)
    together = jax.jit(lambda x: quant_matmul_many(x, weights, specs, backend=backend))(x)
    pairs = list(zip(weights, specs, strict=True))
    apart = jax.jit(lambda x: [quant_matmul(x, *pair, backend=backend) for pair in pairs])(x)
    assert len(together) == len(apart) == 4
    for y, alone in zip(together, apart, strict=True):
        np.testing.assert_array_equal(y, alone)
    with pytest.raises(SpecError, match="each weight needs a spec"):
        quant_matmul_many(x, weights, specs[:3])


def test_gated_weights_must_have_one_n():
    (gate_spec, gate), (up_spec, up) = make_weights(), make_weights(n=41)
    with pytest.raises(SpecError, match="gate and up must have the same N, got 40 and 41"):
        quant_matmul_gated(make_x((2, 96)), gate, up, gate_spec, up_spec)


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_nested_vmap_and_remat_change_nothing(backend):
    spec, first = make_weights(scale_dtype=jnp.bfloat16)
    second = make_weights(scale_dtype=jnp.bfloat16, seed=5)[1]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    x = make_x((2, 3, 4, 96), jnp.bfloat16)

    def run(x, weights):
        return jax.checkpoint(lambda x, w: quant_matmul(x, w, spec, backend=backend))(x, weights)

    out = jax.jit(jax.vmap(jax.vmap(run, in_axes=(0, None))))(x, stacked)
    for rows, ys, weights in zip(x, out, (first, second), strict=True):
        assert_close(
            ys.reshape(12, 40),
            rows.reshape(12, 96),
            weights,
            spec,
            exact_scale=backend == "triton",
        )


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_products_can_be_exported(platform):
    """For a GPU, jax wants to be told that the format of a Triton call may change."""
    spec, weights = make_weights(n=64, k=128, scale_dtype=jnp.bfloat16)
    x = make_x((4, 128), jnp.bfloat16)
    gpu = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100", 132, "cuda"))
    unstable = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with jax.sharding.use_abstract_mesh(gpu), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Triton.*", DeprecationWarning)
        exported = export.export(
            jax.jit(lambda x, w: quant_matmul(x, w, spec)),
            platforms=[platform],
            disabled_checks=[unstable] if platform == "cuda" else [],
        )(x, weights)
    if platform == "cpu":
        assert_close(exported.call(x, weights), x, weights, spec)
    else:
        assert "xla.gpu.triton" in exported.mlir_module()


def test_a_symbolic_number_of_tokens_is_exported_for_cpus_and_refused_for_gpus():
    spec, weights = make_weights(scale_dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((*export.symbolic_shape("t"), 96), jnp.bfloat16)
    multiply = jax.jit(lambda x: quant_matmul(x, weights, spec))
    exported = export.export(multiply, platforms=["cpu"])(x)
    rows = make_x((3, 96), jnp.bfloat16)
    assert_close(exported.call(rows), rows, weights, spec)
    with pytest.raises(BackendError, match=r"known number of tokens, got x \[t, 96\]: export"):
        export.export(multiply, platforms=["cpu", "cuda"])(x)
    by_xla = jax.jit(lambda x: quant_matmul(x, weights, spec, backend="xla"))
    export.export(by_xla, platforms=["cpu", "cuda"])(x)


def test_gradient_leaves_integers_alone():
    spec, weights = make_weights()
    gradient = jax.grad(lambda w: quant_matmul(make_x((2, 96)), w, spec).sum(), allow_int=True)
    assert gradient(weights)["packed"].dtype == jax.dtypes.float0


def test_lowering_decides_the_backend_and_needs_no_gpu():
    spec, weights = make_weights(n=64, k=128)
    x = make_x((4, 128), jnp.bfloat16)
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
    spec, weights = make_weights(n=512, k=512, scale_dtype=jnp.bfloat16)
    layers = [jax.tree.map(lambda a, i=i: a + i, weights) for i in range(4)]

    def decode(x, layers):
        def step(_, x):
            for layer in layers:
                x = quant_matmul(x, layer, spec)
            return x / 100

        return lax.fori_loop(0, 10, step, x)

    compiled = jax.jit(decode).lower(make_x((tokens, 512), dtype), layers).compile()
    expanded = 4 * 512 * 512
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * expanded


def test_stacked_rows_share_one_expanded_weight():
    """With vmap over x alone, eight expansions would be 32 NK bytes; one and a copy are 8 NK."""
    spec, weights = make_weights(n=512, k=512)
    multiply = jax.jit(jax.vmap(lambda x: quant_matmul(x, weights, spec)))
    compiled = multiply.lower(make_x((8, 1, 512))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * 4 * 512 * 512


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((2, 96), np.int32), "x must be float32, bfloat16 or float16, got int32"),
        (np.ones((2, 96), jnp.float8_e4m3fn), "got float8_e4m3fn"),
        (np.ones((2, 95), np.float32), r"x must be \[..., 96\], got \[2, 95\]"),
        (np.float32(1), r"x must be \[..., 96\], got \[\]"),
        (None, "x must be an array, got NoneType"),
    ],
)
def test_x_that_does_not_fit_is_refused(x, message):
    spec, weights = make_weights()
    with pytest.raises(SpecError, match=message):
        quant_matmul(x, weights, spec)


def test_weights_of_another_spec_are_refused():
    _, weights = make_weights()
    other, _ = make_weights(n=80, symmetric=True)
    with pytest.raises(SpecError) as caught:
        quant_matmul(make_x((2, 96)), weights, other)
    assert "packed has shape [1, 1, 64, 32], expected [2, 1, 64, 32]" in str(caught.value)
    assert "zero_point is not expected in a symmetric weight" in str(caught.value)


def test_named_backend_is_that_one_or_an_error():
    spec, weights = make_weights()
    with pytest.raises(BackendError, match=r"None or one of .*got 'cuda'"):
        quant_matmul(make_x((2, 96)), weights, spec, backend="cuda")
    with pytest.raises(BackendError, match=r'"triton" multiplies .* x is float32: cast x, or use'):
        quant_matmul(make_x((2, 96)), weights, spec, backend="triton")


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
    explained = explain(make_weights()[0], dtype, platform=platform, backend=backend)
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
        (SpecError, "cuda", "foo", None, "x must be float32, bfloat16 or float16, got 'foo'"),
    ],
)
def test_explain_refuses_what_cannot_run(error, platform, dtype, backend, message):
    with pytest.raises(error, match=message):
        explain(make_weights()[0], dtype, platform=platform, backend=backend)


def test_what_is_explained_is_a_spec_and_scales_are_floats():
    with pytest.raises(SpecError, match="spec must be a QuantSpec, got NoneType"):
        explain(None, "bfloat16", platform="cuda", tokens=4)
    with pytest.raises(SpecError, match=r"scale_dtype must be .* got int8"):
        explain(make_weights()[0], "bfloat16", tokens=4, scale_dtype="int8")
    for tokens in (-3, 2.0, True, "4"):
        with pytest.raises(SpecError, match="tokens must be an integer of at least 0, got"):
            explain(make_weights()[0], "bfloat16", tokens=tokens)
    assert explain(make_weights()[0], "bfloat16", platform="cuda", tokens=0).schedule is None
    assert explain(make_weights()[0], "bfloat16", platform="cuda", tokens=np.int64(4)).schedule
