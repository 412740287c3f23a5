"""The tile layout: how the integers of a weight lie in memory, and how they get there.

Three forms of the same integers, all without a sign (u = q + 2^(bits-1)):

* words, uint32 [rows, ceil(columns * bits / 32)]: the checkpoint's little-endian bit stream. Its
  values have 1 to 8 bits; the other two forms have 4 or 8;
* codes, uint8 [rows, columns]: one integer per element, the form that a person would check;
* tiles, uint16 [ceil(N/64), ceil(K/tile_k), 64, 32] with tile_k = 32 * planes, planes = 16 / bits:

      bits  bits*i .. bits*i + bits-1  of  tiles[nt, kt, r, j]
      =  codes[64 nt + r, tile_k kt + 32 i + j]

  so plane i of a tile is 32 consecutive input features, and groups of 32, 64 and 128 end on planes.
  Positions past N or K hold 0.

Each function is plain array arithmetic: with NumPy arrays it runs in NumPy, with JAX arrays (also
under `jit`) in XLA, which fuses words -> codes -> tiles into one pass over memory.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import SpecError
from pallas_kernels.format.spec import SLAB_K, TILE_N, QuantSpec

Array = Any
"""A `numpy.ndarray` or a `jax.Array`; what goes in comes out."""


def codes_from_words(words: Array, bits: int, columns: int, *, aligned: bool = False) -> Array:
    """Read a checkpoint's bit stream: uint32 [rows, words] -> codes uint8 [rows, columns].

    Bits past `columns` are dropped.

    Args:
      words: the stream of each row.
      bits: of a value, 1 to 8.
      columns: values of a row.
      aligned: whether a word holds 32 // bits whole values. Otherwise a value may begin in one word
        and end in the next. Both are the same if `bits` divides 32.

    Raises:
      SpecError: if rows have another number of words than `columns` values fill, or the dtype is
        not uint32.
    """
    aligned = aligned or 32 % bits == 0
    count = -(-columns // (32 // bits)) if aligned else -(-columns * bits // 32)
    _check(words, np.uint32, (words.shape[0], count), "words")
    fields = _read_aligned(words, bits) if aligned else _read_stream(words, bits, columns)
    return fields.astype(np.uint8)[:, :columns]


def _read_aligned(words: Array, bits: int) -> Array:
    """uint32 [rows, words] -> values [rows, words * (32 // bits)]."""
    shifts = _namespace(words).arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    fields = (words[:, :, None] >> shifts[None, None, :]) & np.uint32((1 << bits) - 1)
    return fields.reshape(words.shape[0], -1)


def _read_stream(words: Array, bits: int, columns: int) -> Array:
    """uint32 [rows, words] -> values [rows, columns]."""
    xp = _namespace(words)
    word, shift = np.divmod(np.arange(columns) * bits, 32)
    low = words[:, word] >> xp.asarray(shift, np.uint32)[None, :]
    # what is left of a value that ends in the next word; a shift by 32 would be undefined
    after = np.minimum(word + 1, words.shape[1] - 1)
    high = words[:, after] << xp.asarray(-shift % 32, np.uint32)[None, :]
    split = xp.asarray(shift + bits > 32)[None, :]
    return xp.where(split, low | high, low) & np.uint32((1 << bits) - 1)


def words_from_codes(codes: Array, bits: int) -> Array:
    """Write a checkpoint's bit stream: codes uint8 [rows, columns] -> uint32 [rows, words]."""
    xp = _namespace(codes)
    per_word = 32 // bits
    rows, columns = codes.shape
    padded = xp.pad(codes, ((0, 0), (0, -columns % per_word))).reshape(rows, -1, per_word)
    words = padded[:, :, 0].astype(np.uint32)
    for i in range(1, per_word):
        words = words | (padded[:, :, i].astype(np.uint32) << np.uint32(i * bits))
    return words


def tiles_from_codes(codes: Array, spec: QuantSpec) -> Array:
    """Lay codes uint8 [N, K] out in tiles uint16 `spec.packed_shape`."""
    _check(codes, np.uint8, (spec.out_features, spec.in_features), "codes")
    xp = _namespace(codes)
    n, k = spec.tiles_n * TILE_N, spec.tiles_k * spec.tile_k
    padded = xp.pad(codes, ((0, n - spec.out_features), (0, k - spec.in_features)))
    slabs = padded.reshape(spec.tiles_n, TILE_N, spec.tiles_k, spec.planes, SLAB_K)
    tiles = slabs[:, :, :, 0].astype(np.uint16)
    for i in range(1, spec.planes):
        tiles = tiles | (slabs[:, :, :, i].astype(np.uint16) << np.uint16(i * spec.bits))
    return tiles.transpose(0, 2, 1, 3)


def codes_from_tiles(tiles: Array, spec: QuantSpec) -> Array:
    """Read tiles uint16 `spec.packed_shape` back into codes uint8 [N, K]."""
    _check(tiles, np.uint16, spec.packed_shape, "packed")
    xp = _namespace(tiles)
    shifts = xp.arange(0, 16, spec.bits, dtype=np.uint16)
    rows = tiles.transpose(0, 2, 1, 3)[:, :, :, None, :] >> shifts[None, None, None, :, None]
    codes = (rows & np.uint16((1 << spec.bits) - 1)).astype(np.uint8)
    flat = codes.reshape(spec.tiles_n * TILE_N, spec.tiles_k * spec.tile_k)
    return flat[: spec.out_features, : spec.in_features]


def _namespace(array: Array):
    return jnp if isinstance(array, jax.Array) else np


def _check(array: Array, dtype, shape: tuple[int, ...], name: str) -> None:
    if array.dtype != dtype or tuple(array.shape) != shape:
        raise SpecError(
            f"{name}: expected {np.dtype(dtype).name} {list(shape)}, "
            f"found {array.dtype.name} {list(array.shape)}"
        )
