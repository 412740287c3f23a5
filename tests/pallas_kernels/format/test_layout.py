"""Words, codes and tiles are one and the same integers, in NumPy and in jitted JAX."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import SpecError
from pallas_kernels.format.layout import (
    codes_from_tiles,
    codes_from_words,
    tiles_from_codes,
    words_from_codes,
)
from pallas_kernels.format.spec import QuantSpec
from tests.folders import make_codes, write_bit_stream

# one compilation per shape: few examples, no deadline
PROPERTY = hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
SIZES = st.one_of(st.sampled_from([1, 2, 7, 8, 63, 64, 65, 127, 128, 129]), st.integers(1, 150))


@st.composite
def specs(draw) -> QuantSpec:
    size, groups = draw(SIZES), draw(st.sampled_from([1, 1, 2, 3]))
    return QuantSpec(
        bits=draw(st.sampled_from([4, 8])),
        group_size=size,
        symmetric=draw(st.booleans()),
        in_features=size * groups,
        out_features=draw(SIZES),
    )


def place_by_definition(codes: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """The equation of the layout's docstring, one element at a time."""
    tiles = np.zeros(spec.packed_shape, np.uint16)
    for n, k in np.ndindex(codes.shape):
        nt, r = divmod(n, 64)
        kt, rest = divmod(k, spec.tile_k)
        i, j = divmod(rest, 32)
        tiles[nt, kt, r, j] |= np.uint16(int(codes[n, k]) << (spec.bits * i))
    return tiles


@PROPERTY
@hypothesis.given(specs(), st.integers(0, 2**32 - 1))
def test_every_form_follows_from_its_definition_and_leads_back(spec, seed):
    codes = make_codes(spec, seed)
    words, tiles = (
        write_bit_stream(codes, spec.bits).view(np.uint32),
        place_by_definition(codes, spec),
    )
    for put, jit in ((np.asarray, lambda f: f), (jnp.asarray, jax.jit)):
        forms = {
            "words": jit(functools.partial(words_from_codes, bits=spec.bits))(put(codes)),
            "tiles": jit(functools.partial(tiles_from_codes, spec=spec))(put(codes)),
        }
        read = jit(lambda words: codes_from_words(words, spec.bits, spec.in_features))
        back = read(put(words)), jit(functools.partial(codes_from_tiles, spec=spec))(put(tiles))
        assert all(isinstance(a, type(put(codes))) for a in (*forms.values(), *back))
        assert (forms["words"].dtype, forms["tiles"].dtype) == (np.uint32, np.uint16)
        np.testing.assert_array_equal(forms["words"], words)
        np.testing.assert_array_equal(forms["tiles"], tiles)
        for read_back in back:
            assert read_back.dtype == np.uint8
            np.testing.assert_array_equal(read_back, codes)


@pytest.mark.parametrize(
    ("bits", "words"),
    [(4, [0x76543210, 0x00000A98]), (8, [0x7B7A7978, 0x7F7E7D7C, 0x00828180])],
)
def test_a_row_of_integers_is_the_known_words(bits, words):
    q = np.array([[-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2]])
    codes = (q + 2 ** (bits - 1)).astype(np.uint8)
    expected = np.array([words], np.uint32)
    np.testing.assert_array_equal(words_from_codes(codes, bits), expected)
    np.testing.assert_array_equal(codes_from_words(expected, bits, q.shape[1]), codes)


def test_zero_points_lie_along_rows_as_the_known_words():
    """[10, 2] zero points: one column -8..1, one -1..7 and -1, four bits along N."""
    columns = np.array([[*range(-8, 2)], [*range(-1, 8), -1]])
    words = np.array([[0x76543210, 0xEDCBA987], [0x98, 0x7F]], np.uint32)
    np.testing.assert_array_equal(words_from_codes((columns + 8).astype(np.uint8), 4), words.T)
    np.testing.assert_array_equal(codes_from_words(words.T.copy(), 4, 10), columns + 8)


def test_a_tile_has_consecutive_features_in_a_plane():
    spec = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=128, out_features=64)
    codes = np.zeros((64, 128), np.uint8)
    codes[5, 32:64] = 0xF  # plane 1 of row 5
    tiles = np.zeros(spec.packed_shape, np.uint16)
    tiles[0, 0, 5, :] = 0x00F0
    np.testing.assert_array_equal(tiles_from_codes(codes, spec), tiles)


def test_bits_of_padding_are_dropped():
    spec = QuantSpec(bits=8, group_size=3, symmetric=True, in_features=3, out_features=2)
    words = np.array([[0xAA030201], [0xBB060504]], np.uint32)
    codes = [[1, 2, 3], [4, 5, 6]]
    np.testing.assert_array_equal(codes_from_words(words, 8, 3), codes)
    full = np.full(spec.packed_shape, 0xFFFF, np.uint16)
    np.testing.assert_array_equal(codes_from_tiles(full, spec), np.full((2, 3), 0xFF))


@pytest.mark.parametrize("put", [np.asarray, jnp.asarray])
def test_wrong_shape_or_dtype_is_refused_with_both(put):
    spec = QuantSpec(bits=4, group_size=3, symmetric=True, in_features=3, out_features=2)
    with pytest.raises(SpecError, match=r"words: expected uint32 \[2, 1\], found uint32 \[2, 2\]"):
        codes_from_words(put(np.zeros((2, 2), np.uint32)), 4, 3)
    with pytest.raises(SpecError, match=r"words: expected uint32 \[2, 1\], found int32 \[2, 1\]"):
        codes_from_words(put(np.zeros((2, 1), np.int32)), 4, 3)
    with pytest.raises(SpecError, match=r"codes: expected uint8 \[2, 3\], found uint8 \[3, 2\]"):
        tiles_from_codes(put(np.zeros((3, 2), np.uint8)), spec)
    with pytest.raises(SpecError, match=r"codes: expected uint8 \[2, 3\], found int8 \[2, 3\]"):
        tiles_from_codes(put(np.zeros((2, 3), np.int8)), spec)
    with pytest.raises(SpecError, match=r"packed: expected uint16 \[1, 1, 64, 32\], found uint16"):
        codes_from_tiles(put(np.zeros((1, 2, 64, 32), np.uint16)), spec)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 11), (10, 64), (33, 100)])
def test_words_are_those_of_compressed_tensors(bits, shape):
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = np.random.default_rng(0).integers(0, 2**bits, shape).astype(np.uint8)
    signed = torch.from_numpy(codes.astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)
    along_k = helpers.pack_to_int32(signed, bits)
    along_n = helpers.pack_to_int32(signed.T.contiguous(), bits, packed_dim=0)
    words = words_from_codes(codes, bits).view(np.int32)
    np.testing.assert_array_equal(words, along_k.numpy())
    np.testing.assert_array_equal(words.T, along_n.numpy())
    unpacked = helpers.unpack_from_int32(torch.from_numpy(words), bits, torch.Size(shape))
    np.testing.assert_array_equal(unpacked.numpy(), signed.numpy())
