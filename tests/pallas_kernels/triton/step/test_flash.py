"""The kernel for attention of a piece, in interpret mode against float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.errors import BackendError
from pallas_kernels.tiles.attention.flash_rules import FlashTiles
from pallas_kernels.triton.step.flash import attend_piece
from tests.pallas_kernels.pieces import Piece, attend_exactly, draw_piece


def _tiles(block_m: int = 16, block_n: int = 16) -> FlashTiles:
    return FlashTiles(block_m=block_m, block_n=block_n, warps=4, stages=2)


@functools.partial(jax.jit, static_argnames=("window", "scale", "softcap", "tiles"))
def _run(q, k, v, start, count, *, window, scale=None, softcap=None, tiles=None):
    """An interpreted kernel is compiled again by every call outside of jit."""
    bounds = {"start": start, "count": count, "window": window}
    scores = {"scale": scale, "softcap": softcap}
    return attend_piece(q, k, v, **bounds, **scores, tiles=tiles, interpret=True)


def _attend(piece: Piece, **options) -> np.ndarray:
    arrays = map(jnp.asarray, (piece.q, piece.k, piece.v, piece.start, piece.count))
    return np.asarray(_run(*arrays, window=piece.window, **options))


def _assert_right(found: np.ndarray, piece: Piece, *scores: float | None) -> None:
    """Within the bound, and finite also where there is padding."""
    assert np.isfinite(found.astype(np.float64)).all()
    tokens = np.where(piece.is_token()[..., None], found.astype(np.float64), 0)
    assert attend_exactly(piece, *scores).measure(tokens) <= 1


CASES = {
    "one head a key head": draw_piece(33, (2, 2), 64, 40, [(0, 33)]),
    "heads that fill no tile": draw_piece(19, (14, 2), 64, 50, [(31, 19)]),
    "rows of unequal length": draw_piece(24, (6, 2), 64, 64, [(40, 24), (0, 3), (7, 0), (0, 0)]),
    "float16": draw_piece(24, (4, 1), 128, 64, [(40, 24), (5, 20)], dtype="float16"),
    "a window within a block": draw_piece(40, (3, 1), 64, 90, [(50, 40), (0, 17)], window=5),
    "a window of many blocks": draw_piece(40, (3, 1), 64, 90, [(50, 40), (2, 9)], window=37),
    "a window of one": draw_piece(20, (2, 1), 64, 50, [(0, 20), (30, 20)], window=1),
    "a window past all": draw_piece(20, (2, 1), 64, 50, [(0, 20), (30, 20)], window=999),
    "a head of no power of two": draw_piece(20, (2, 1), 80, 50, [(0, 20), (30, 20)]),
    "a wide head": draw_piece(20, (2, 1), 256, 50, [(30, 20)], dtype="float16"),
    "the widest head": draw_piece(17, (2, 1), 512, 20, [(3, 17)]),
    "a single query": draw_piece(1, (8, 2), 64, 70, [(69, 1), (0, 1)], window=20),
    "one slot": draw_piece(1, (1, 1), 16, 1, [(0, 1)]),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_is_within_the_bound_whatever_unseen_slots_hold(case):
    piece = CASES[case]
    _assert_right(_attend(piece.poison(), tiles=_tiles()), piece)


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 16), (128, 128)])
def test_every_tile_shape_gives_the_same(block_m, block_n):
    piece = draw_piece(50, (6, 2), 64, 100, [(40, 50), (0, 31)], window=41)
    _assert_right(_attend(piece.poison(), tiles=_tiles(block_m, block_n)), piece)


def test_a_piece_without_a_cache_is_its_own():
    piece = draw_piece(70, (4, 2), 64, 70, [(0, 70), (0, 33)])
    _assert_right(_attend(piece), piece)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_another_scale_multiplies_the_scores(scale):
    piece = draw_piece(20, (2, 1), 32, 30, [(5, 20)])
    _assert_right(_attend(piece, scale=scale, tiles=_tiles()), piece, scale)


@pytest.mark.parametrize(("window", "dtype"), [(None, "bfloat16"), (9, "float16")])
def test_scores_are_capped(window, dtype):
    """From scores that hardly feel it to those at the cap."""
    piece = draw_piece(20, (6, 2), 32, 60, [(35, 20), (0, 7)], window=window, dtype=dtype)
    for scale in (0.05, 2.0):
        found = _attend(piece.poison(), scale=scale, softcap=3.0, tiles=_tiles())
        _assert_right(found, piece, scale, 3.0)
    tokens = np.where(piece.is_token()[..., None], found.astype(np.float64), 0)
    assert attend_exactly(piece, 2.0).measure(tokens) > 1


def test_large_scores_overflow_nothing():
    """Scores up to thousands: weights are 0 and 1, and those of float16 cannot pass 1."""
    piece = draw_piece(20, (2, 1), 64, 30, [(5, 20)], dtype="float16", seed=3)
    piece = Piece(piece.q * 30, piece.k * 30, piece.v, piece.start, piece.count, None)
    _assert_right(_attend(piece, tiles=_tiles()), piece)


def test_a_nan_reaches_only_tiles_that_see_it():
    """16 rows a tile, 2 heads: eight queries. Slot 20 is first seen in the third tile."""
    piece = draw_piece(24, (2, 1), 64, 24, [(0, 24)])
    clean = _attend(piece, tiles=_tiles())
    piece.k[0, 20], piece.v[0, 20] = np.nan, np.nan
    found = _attend(piece, tiles=_tiles())
    np.testing.assert_array_equal(found[:, :16], clean[:, :16])
    assert np.isnan(found[:, 20:].astype(np.float32)).all()


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 9)).filter(lambda p: sum(p) <= 30),
        min_size=3,
        max_size=3,
    ),
    st.sampled_from([None, 1, 4, 17]),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_rows_begin_and_end_anywhere(places, window, seed):
    piece = draw_piece(9, (4, 2), 16, 30, places, window=window, seed=seed)
    _assert_right(_attend(piece.poison(), tiles=_tiles()), piece)


def test_a_row_does_not_depend_on_its_neighbours():
    piece = draw_piece(20, (4, 2), 64, 50, [(30, 20), (0, 11)])
    alone = Piece(piece.q[1:], piece.k[2:], piece.v[2:], piece.start[1:], piece.count[1:], None)
    together = _attend(piece, tiles=_tiles())[1:]
    np.testing.assert_array_equal(together, _attend(alone, tiles=_tiles()))


def test_vmap_over_pieces_is_the_loop():
    pieces = [draw_piece(9, (4, 2), 16, 30, [(5, 9), (0, 4)], seed=seed) for seed in range(2)]
    stacked = [
        jnp.stack([jnp.asarray(getattr(piece, name)) for piece in pieces])
        for name in ("q", "k", "v", "start", "count")
    ]
    run = functools.partial(_run, window=None, tiles=_tiles())
    for found, piece in zip(jax.vmap(run)(*stacked), pieces, strict=True):
        np.testing.assert_array_equal(found, _attend(piece, tiles=_tiles()))


@pytest.mark.parametrize("dtypes", [("float32",) * 3, ("bfloat16", "bfloat16", "float16")])
def test_other_dtypes_are_refused(dtypes):
    shapes = (1, 4, 1, 16), (1, 4, 16), (1, 4, 16)
    q, k, v = (jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    bound = jnp.zeros(1, jnp.int32)
    with pytest.raises(BackendError, match="takes bfloat16 or float16 alone, got"):
        attend_piece(q, k, v, start=bound, count=bound, window=None)
