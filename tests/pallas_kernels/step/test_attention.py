"""`attend` on every backend and under every transformation."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.errors import BackendError
from pallas_kernels.step.attention import attend
from pallas_kernels.xla.attention import attend as attend_by_xla
from tests.jaxprs import find_kernels
from tests.pallas_kernels.pieces import Piece, attend_exactly, draw_piece

PLACES = [(21, 20), (0, 11), (3, 1)]


def _list_arrays(piece: Piece, dtype=None) -> list[jax.Array]:
    """The arguments of `attend`; numbers in another dtype, if one is given."""
    arrays = [jnp.asarray(x) for x in (piece.q, piece.k, piece.v)]
    arrays = arrays if dtype is None else [x.astype(dtype) for x in arrays]
    return [*arrays, jnp.asarray(piece.start), jnp.asarray(piece.count)]


@functools.partial(jax.jit, static_argnames=("window", "scale", "softcap", "backend"))
def _run(q, k, v, start, count, *, window, scale=None, softcap=None, backend=None):
    return attend(q, k, v, start, count, window, scale=scale, softcap=softcap, backend=backend)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        ("bfloat16", None),
        ("float16", "xla"),
        ("bfloat16", "triton"),
        ("float16", "triton"),
        ("float32", None),
    ],
)
def test_every_backend_is_within_the_bound(dtype, backend, window):
    """XLA rounds normalised weights, and mixes them in the dtype of q; the bound is thrice ours."""
    drawn = "bfloat16" if dtype == "float32" else dtype
    piece = draw_piece(20, (6, 2), 32, 48, PLACES, window=window, dtype=drawn)
    found = _run(*_list_arrays(piece, dtype), window=window, backend=backend)
    assert found.dtype == dtype
    tokens = np.where(piece.is_token()[..., None], np.asarray(found, np.float64), 0)
    assert np.isfinite(np.asarray(found, np.float64)).all()
    assert attend_exactly(piece).measure(tokens) <= (1 if backend == "triton" else 3)


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_scores_have_their_scale_and_softcap_on_every_backend(backend):
    piece = draw_piece(20, (2, 1), 32, 30, [(5, 20)])
    scores = {"scale": 0.4, "softcap": 2.0}
    found = _run(*_list_arrays(piece), window=None, backend=backend, **scores)
    found, bound = np.asarray(found, np.float64), 1 if backend == "triton" else 3
    assert attend_exactly(piece, **scores).measure(found) <= bound
    for wrong in scores:
        others = {key: value for key, value in scores.items() if key != wrong}
        assert attend_exactly(piece, **others).measure(found) > bound


def test_float32_is_exact_to_its_own_bits():
    """The bound of 16 bits would pass whatever rounds as they do."""
    piece = draw_piece(20, (6, 2), 32, 48, PLACES)
    found = np.asarray(_run(*_list_arrays(piece, "float32"), window=None), np.float64)
    exact = attend_exactly(piece).value
    np.testing.assert_allclose(np.where(piece.is_token()[..., None], found, 0), exact, atol=4e-6)


@pytest.mark.parametrize("backend", [None, "triton"])
def test_derivatives_are_those_of_the_xla_form(backend):
    piece = draw_piece(9, (4, 2), 16, 24, [(10, 9), (0, 5)], window=6)
    *arrays, start, count = _list_arrays(piece)

    def differentiate(run):
        def add_up(*arrays):
            return run(*arrays, start, count).astype(jnp.float32).sum()

        return jax.jit(jax.grad(add_up, argnums=(0, 1, 2)))(*arrays)

    ours = differentiate(functools.partial(attend, window=6, backend=backend))
    for found, right in zip(
        ours, differentiate(functools.partial(attend_by_xla, window=6)), strict=True
    ):
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("backend", ["xla", "triton", None])
def test_vmap_over_pieces_is_the_loop(backend):
    pieces = [_list_arrays(draw_piece(9, (4, 2), 16, 24, [(5, 9)], seed=n)) for n in range(2)]
    run = functools.partial(_run, window=None, backend=backend)
    together = jax.vmap(run)(*map(jnp.stack, zip(*pieces, strict=True)))
    for found, piece in zip(together, pieces, strict=True):
        np.testing.assert_allclose(
            found.astype(jnp.float32), run(*piece).astype(jnp.float32), atol=2**-6
        )


def _lower(arrays, platform: str, **options) -> str:
    # since jax 0.11 Pallas-Triton asks the mesh which GPU it lowers for, and warns of its end
    gpu = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100", 132, "cuda"))
    with jax.sharding.use_abstract_mesh(gpu), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Triton.*", DeprecationWarning)
        traced = jax.jit(functools.partial(_run, window=None, **options)).trace(*arrays)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def test_lowering_decides_the_backend_and_needs_no_gpu():
    arrays = _list_arrays(draw_piece(20, (6, 2), 32, 48, PLACES))
    for_gpu = _lower(arrays, "cuda")
    assert "triton" in for_gpu
    assert "stablehlo.dot_general" not in for_gpu
    wide = [x.astype(jnp.float32) for x in arrays[:3]] + arrays[3:]
    for text in (
        _lower(arrays, "cpu"),
        _lower(arrays, "cuda", backend="xla"),
        _lower(wide, "cuda"),
    ):
        assert "triton" not in text
        assert "stablehlo.dot_general" in text


def test_one_query_fills_no_tile():
    many, one = (_list_arrays(draw_piece(n, (4, 2), 16, 24, [(5, n)])) for n in (2, 1))
    assert len(find_kernels(functools.partial(_run, window=None), *many)) == 1
    assert not find_kernels(functools.partial(_run, window=None), *one)


def test_symbolic_sizes_are_exported_for_cpus_and_refused_for_gpus():
    batch, steps = export.symbolic_shape("b, s")
    q = jax.ShapeDtypeStruct((batch, steps, 4, 16), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2 * batch, steps, 16), jnp.bfloat16)
    bound = jax.ShapeDtypeStruct((batch,), jnp.int32)
    run = jax.jit(functools.partial(attend, window=None))
    exported = export.export(run, platforms=["cpu"])(q, k, k, bound, bound)
    arrays = _list_arrays(draw_piece(9, (4, 2), 16, 9, [(0, 9)]))
    np.testing.assert_array_equal(exported.call(*arrays), _run(*arrays, window=None))
    with pytest.raises(BackendError, match=r"known sizes, got queries \[b, s, 4, 16\]"):
        export.export(run, platforms=["cpu", "cuda"])(q, k, k, bound, bound)
