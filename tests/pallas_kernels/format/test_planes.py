"""Reading fields of words as floats: PTX text, plain form and integers, exhaustively."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.format.planes import Plane, add_plain, describe_plane, negate_zero
from tests import ptx

_WORDS = np.arange(65536, dtype=np.uint32)
_FORMS = [
    (bits, plane, dtype)
    for bits in (4, 8)
    for plane in range(16 // bits)
    for dtype in (jnp.bfloat16, jnp.float16)
]


def _run_asm(asm: str, words: np.ndarray, addends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both halves of the results, for each word in the low half and another in the high one."""
    others = words[::-1] ^ np.uint32(0x5A5A)
    bits = addends.view(np.uint16).astype(np.uint32)
    out = ptx.run(asm, words | others << np.uint32(16), bits | bits << np.uint32(16))
    low = (out & np.uint32(0xFFFF)).astype(np.uint16).view(addends.dtype)
    high = (out >> np.uint32(16)).astype(np.uint16).view(addends.dtype)
    return low, high[np.argsort(others)]


def _count(words: np.ndarray, bits: int, plane: int) -> np.ndarray:
    """q of each word's field, as an integer."""
    return (words.astype(np.int64) >> bits * plane & 2**bits - 1) - 2 ** (bits - 1)


@pytest.mark.parametrize(("bits", "plane", "dtype"), _FORMS)
def test_every_word_with_every_zero_point_is_exact_in_both_forms(bits, plane, dtype):
    """All 65536 words; at 4 bits all zero points, at 8 bits the extremes and some between."""
    half = 2 ** (bits - 1)
    zeros = range(-half, half) if bits == 4 else (-128, -127, -65, -1, 0, 1, 64, 126, 127)
    form = describe_plane(bits, plane, dtype)
    q = _count(_WORDS, bits, plane)
    for zero in zeros:
        addend = negate_zero(jnp.full(_WORDS.shape, zero, jnp.int8), form)
        plain = np.asarray(add_plain(jnp.asarray(_WORDS.astype(np.uint16)), addend, form))
        np.testing.assert_array_equal(plain.astype(np.float64), q - zero)
        for half_word in _run_asm(form.asm, _WORDS, np.asarray(addend)):
            np.testing.assert_array_equal(half_word.view(np.uint16), plain.view(np.uint16))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("plane", [0, 1])
def test_every_byte_with_every_zero_point_is_exact_in_both_forms(plane, dtype):
    form = describe_plane(8, plane, dtype)
    codes, zeros = np.meshgrid(np.arange(256), np.arange(-128, 128), indexing="ij")
    words = (codes.ravel() << 8 * plane | 0xA5 << 8 * (1 - plane)).astype(np.uint32)
    addend = negate_zero(jnp.asarray(zeros.ravel(), jnp.int8), form)
    plain = np.asarray(add_plain(jnp.asarray(words.astype(np.uint16)), addend, form))
    np.testing.assert_array_equal(plain.astype(np.float64), codes.ravel() - 128 - zeros.ravel())
    bits = np.asarray(addend).view(np.uint16).astype(np.uint32)
    out = ptx.run(form.asm, words | words << np.uint32(16), bits | bits << np.uint32(16))
    for shift in (0, 16):
        np.testing.assert_array_equal(
            (out >> np.uint32(shift)).astype(np.uint16), plain.view(np.uint16)
        )


@pytest.mark.parametrize(("bits", "plane", "dtype"), _FORMS)
def test_without_a_zero_point_it_is_q(bits, plane, dtype):
    form = describe_plane(bits, plane, dtype)
    words = jnp.asarray(_WORDS.astype(np.uint16))
    plain = add_plain(words, jnp.broadcast_to(negate_zero(None, form), words.shape), form)
    np.testing.assert_array_equal(np.asarray(plain, np.float64), _count(_WORDS, bits, plane))


@pytest.mark.parametrize(("bits", "plane", "dtype"), _FORMS)
def test_any_changed_literal_changes_the_result(bits, plane, dtype):
    """So the comparison above is one that a wrong text fails, in each half of each literal."""
    form = describe_plane(bits, plane, dtype)
    addend = np.asarray(negate_zero(jnp.full(_WORDS.shape, 1, jnp.int8), form))
    right = _run_asm(form.asm, _WORDS, addend)
    literals = list(re.finditer(r"(?<![\w$.])(0x[0-9A-F]+|[0-9]+)\b", form.asm))
    assert len(literals) >= 3  # at least a shift or a selector, the power of two, 1
    for literal in literals:
        # of the constant that prmt takes bytes from, it takes only the lowest
        is_pair = len(literal[0]) == 10 and literal[0] != "0x64646464"
        for bit in (1, 17) if is_pair else (1,):
            start, end = literal.span()
            value = f"{int(literal[0], 0) ^ 1 << bit:#x}"
            changed = form.asm[:start] + value + form.asm[end:]
            try:
                wrong = _run_asm(changed, _WORDS, addend)
            except ValueError:  # a sum that the evaluator refuses to round is wrong, too
                continue
            assert any((a != b).any() for a, b in zip(right, wrong, strict=True)), changed


def test_planes_are_described_once_per_width_and_dtype():
    forms = {describe_plane(*form) for form in _FORMS}
    assert len(forms) == len(_FORMS)
    assert all(isinstance(form, Plane) for form in forms)
