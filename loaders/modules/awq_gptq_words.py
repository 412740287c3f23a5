"""The arrays of AutoAWQ and GPTQ files, which hold the transpose of what compressed-tensors holds.

    quantity     GPTQ                              AWQ ("gemm", 4 bits)
    qweight      int32 [K * bits / 32, N]          int32 [K, N / 8]
    qzeros       int32 [G, N * bits / 32]          int32 [G, N / 8]
    scales       [G, N], G = ceil(K / group_size)  [G, N]
    g_idx        int32 [K]: group of each feature  none

GPTQ packs along K (zero points along N) as a dense little-endian stream of bits. AWQ packs both
along N, eight values to a word; the value at bits 4 i of it is that of output feature
`(0, 2, 4, 6, 1, 3, 5, 7)[i]` (autoawq 0.2.9, `awq/modules/linear/gemm.py`). Weight and zero point
have no sign: w = (u - z) * s.

Of a zero point z the file holds z, or z - 1 where the format is "gptq" (auto_gptq 0.7.1,
`nn_modules/qlinear/qlinear_cuda.py`). GPTQModel subtracts the 1 from whole words, so that a z of 0
borrows from the next one (`utils/model.py`, `convert_gptq_v2_to_v1_format_module`). At 3 bits it
subtracts from each value, modulo 8. Adding the 1 back in the same way always gives z.

As in `pallas_kernels.format.layout`, NumPy arrays are computed with in NumPy and JAX arrays in XLA.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loaders.modules.encoding import Encoding
from loaders.schemes.packings import AWQ, GPTQ, LESS_ONE, LESS_ONE_BORROWED
from pallas_kernels.format.layout import codes_from_words
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import SCALE_DTYPES

Array = Any
"""A `numpy.ndarray` or a `jax.Array`; what goes in comes out."""

# bit at which output feature i of a word's eight begins
_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


def list_tensors_of(
    spec: QuantSpec, encoding: Encoding
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Role -> (allowed dtypes, shape) of a module's tensors, those included that may be absent."""
    n, k = spec.out_features, spec.in_features
    wide, long = encoding.count_words(n), encoding.count_words(k)
    groups = encoding.count_groups(spec)
    tensors = {
        "weight_packed": (("int32",), (k, wide) if encoding.words == AWQ else (long, n)),
        "weight_scale": (SCALE_DTYPES, (groups, n)),
        "weight_zero_point": (("int32",), (groups, wide)),
    }
    if encoding.words == GPTQ:
        tensors["weight_g_idx"] = (("int32",), (k,))
    return tensors


def read_weight(words: Array, encoding: Encoding, in_features: int) -> Array:
    """uint32 words of `qweight` -> codes uint8 [N, K], of the bits of the file."""
    if encoding.words == AWQ:
        words = _turn_words(words)
    return codes_from_words(words.T, encoding.bits, in_features)


def read_zero_points(words: Array, encoding: Encoding, out_features: int) -> Array:
    """uint32 words of `qzeros` -> zero points without a sign, uint8 [N, G]."""
    if encoding.words == AWQ:
        return codes_from_words(_turn_words(words).T, encoding.bits, words.shape[0])
    bits = encoding.bits
    added = encoding.zero_points in (LESS_ONE, LESS_ONE_BORROWED)
    if added and 32 % bits == 0:
        words = words + np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    codes = codes_from_words(words, bits, out_features).T
    return (codes + np.uint8(1)) & np.uint8(2**bits - 1) if added and 32 % bits else codes


def _turn_words(words: Array) -> Array:
    """uint32 [rows, N / 8] of AWQ -> [rows / 8, N] of GPTQ: eight words by eight are transposed.

    So that words are written where words are read: five times as fast on a CPU as one by one.
    """
    xp = jnp if isinstance(words, jax.Array) else np
    blocks = xp.pad(words, ((0, -words.shape[0] % 8), (0, 0))).reshape(-1, 8, words.shape[1])
    turned = []
    for shift in _AWQ_SHIFTS:
        parts = (blocks >> np.uint32(shift)) & np.uint32(15)
        word = parts[:, 0]
        for i in range(1, 8):
            word = word | (parts[:, i] << np.uint32(4 * i))
        turned.append(word)
    return xp.stack(turned, axis=2).reshape(blocks.shape[0], -1)
