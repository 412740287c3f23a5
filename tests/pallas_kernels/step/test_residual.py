"""Products that go onto the stream compute what product, sum and norms compute apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pallas_kernels import SpecError, quant_matmul, quant_moe
from pallas_kernels.formulas.norms import Norm, Onto, add_norm
from pallas_kernels.moe import Options
from pallas_kernels.step.residual import add_onto, multiply_onto, run_experts_onto
from tests.jaxprs import find_kernels
from tests.pallas_kernels.experts import draw_choices, make_experts
from tests.pallas_kernels.products import make_weights
from tests.pallas_kernels.products import make_x as make_wide_x

N, K = 96, 160
BACKENDS = ["xla", "triton"]
AS_WRITTEN = {"xla_allow_excess_precision": False}


def make_x(shape, dtype=jnp.bfloat16, seed=1) -> jax.Array:
    return make_wide_x(shape, dtype, seed)


def make_onto(shape, dtype=jnp.bfloat16, *, late=False, early=True, factor=1.0) -> Onto:
    rng = np.random.default_rng(0)
    norm = Norm(jnp.asarray(rng.normal(size=shape[-1]), dtype), 1e-6, "rounded")
    residual = jnp.asarray(rng.normal(size=shape), dtype)
    return Onto(residual, norm if late else None, norm if early else None, factor=factor)


def assert_close(ours, theirs) -> None:
    """A number on the edge between two of 16 bits may be rounded either way, in each of two steps.

    That is 2^-8 of it twice, and what the first step changes of a row's norm.
    """
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=2.0**-6, atol=2.0**-6
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reordered", [False, True])
def test_a_packed_product_goes_onto_the_stream(backend, reordered):
    spec, weights = make_weights(4, N, K, 32, symmetric=False)
    if reordered:
        perm = np.random.default_rng(1).permutation(K)
        weights = {**weights, "perm": jnp.asarray(perm, jnp.int32)}
    x, onto = make_x((2, 3, K)), make_onto((2, 3, N), factor=0.3)
    apart = add_norm(quant_matmul(x, weights, spec, backend=backend), onto)
    run = jax.jit(lambda x, w, onto: multiply_onto(x, w, spec, onto, backend=backend))
    assert_close(run(x, weights, onto), apart)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_late_norm_alone_gives_the_stream_alone(backend):
    spec, weights = make_weights(8, N, K, 32, symmetric=True)
    x, onto = make_x((3, K)), make_onto((3, N), late=True, early=False)
    stream, normalised = multiply_onto(x, weights, spec, onto, backend=backend)
    assert normalised is None
    apart = add_norm(quant_matmul(x, weights, spec, backend=backend), onto)
    assert_close([stream], apart[:1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_go_onto_the_stream_with_the_shared_ones(backend):
    experts = make_experts()
    ids, factors = draw_choices(3, 8, 2)
    x, onto = make_x((3, 64)), make_onto((3, 64), factor=0.3)
    shared, gate = make_x((3, 64), seed=4), make_x((3, 1), seed=5)
    weighed = shared.astype(jnp.float32) * jax.nn.sigmoid(gate.astype(jnp.float32))
    y = quant_moe(x, ids, factors, *experts.arguments, shared=weighed, backend=backend)
    ours = run_experts_onto(
        x,
        ids,
        factors,
        *experts.arguments,
        onto,
        options=Options(),
        shared=shared,
        shared_gate=gate,
        backend=backend,
    )
    assert_close(ours, add_norm(y, onto))


def test_on_a_gpu_a_product_and_what_follows_are_two_kernels():
    spec, weights = make_weights(4, N, K, 32, symmetric=False)
    arguments = make_x((1, K)), weights, make_onto((1, N))
    run = lambda x, w, onto: multiply_onto(x, w, spec, onto, backend="triton")  # noqa: E731
    assert len(find_kernels(run, *arguments)) == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_factor_is_not_rounded_and_what_it_multiplies_is(dtype):
    """As transformers does it: a product of 16 bits times a number of Python, then the sum."""
    y, onto = make_x((3, N), dtype), make_onto((3, N), dtype, early=False, factor=0.22)
    theirs = [torch.from_numpy(np.asarray(x, np.float32)) for x in (onto.residual, y)]
    residual, product = (x.to(getattr(torch, jnp.dtype(dtype).name)) for x in theirs)
    expected = (residual + product * 0.22).float().numpy()
    for backend in BACKENDS:
        run = jax.jit(
            lambda y, onto, b=backend: add_onto(y, onto, backend=b)[0], compiler_options=AS_WRITTEN
        )
        np.testing.assert_array_equal(np.asarray(run(y, onto), np.float32), expected)


def test_rows_under_vmap_are_rows_of_one_product():
    spec, weights = make_weights(4, N, K, 32, symmetric=False)
    x, onto = make_x((4, 3, K)), make_onto((4, 3, N))

    def run(x, residual):
        return multiply_onto(x, weights, spec, Onto(residual, early=onto.early), backend="triton")

    batched = jax.vmap(run)(x, onto.residual)
    for one, other in zip(batched, run(x, onto.residual), strict=True):
        np.testing.assert_array_equal(one, other)


def test_derivatives_are_those_of_the_formula():
    spec, weights = make_weights(4, N, K, 32, symmetric=False)
    x, onto = make_x((3, K), jnp.float32), make_onto((3, N), jnp.float32)

    def loss(run, x, onto):
        stream, normalised = run(x, onto)
        return (stream * jnp.cos(stream)).sum() + (normalised**2).sum()

    ours = lambda x, onto: multiply_onto(x, weights, spec, onto)  # noqa: E731
    apart = lambda x, onto: add_norm(quant_matmul(x, weights, spec), onto)  # noqa: E731
    slopes = (jax.tree.leaves(jax.grad(loss, (1, 2))(run, x, onto)) for run in (ours, apart))
    for one, other in zip(*slopes, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_finished_product_goes_onto_the_stream(backend):
    y, onto = make_x((2, 3, N)), make_onto((2, 3, N), late=True, factor=0.3)
    assert_close(add_onto(y, onto, backend=backend), add_norm(y, onto))
    empty = make_onto((0, N))
    assert [part.shape for part in add_onto(y[0, :0], empty, backend=backend)] == [(0, N)] * 2


def test_an_input_of_another_size_is_refused():
    spec, weights = make_weights(4, N, K, 32, symmetric=False)
    with pytest.raises(SpecError, match="x must be"):
        multiply_onto(make_x((3, K + 1)), weights, spec, make_onto((3, N)))
