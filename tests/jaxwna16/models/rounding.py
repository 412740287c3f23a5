"""Numbers of 16 bits that JAX and torch hold alike, and how many steps apart two of them are."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch


class Both(NamedTuple):
    """The same numbers in JAX and in torch."""

    ours: jax.Array
    theirs: torch.Tensor


def round_to(dtype: str, values: np.ndarray) -> Both:
    """Values rounded to "bfloat16" or "float16"."""
    rounded = jnp.asarray(values, jnp.float32).astype(dtype)
    wide = torch.from_numpy(np.array(rounded.astype(jnp.float32)))
    return Both(rounded, wide.to(getattr(torch, dtype)))


def draw_exact(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Both:
    """Multiples of 1/16 up to 101/16, of which sums of squares are exact in float32.

    The mean over the last axis is such a multiple, too. So the same is true of differences from it.
    """
    integers = np.random.default_rng(seed).integers(-100, 101, shape)
    integers -= np.arange(shape[-1]) < integers.sum(-1, keepdims=True) % shape[-1]
    return round_to(dtype, integers / 16)


def draw_normal(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Both:
    """Normal numbers."""
    return round_to(dtype, np.random.default_rng(seed).standard_normal(shape))


def count_steps(ours: jax.Array, theirs: torch.Tensor) -> np.ndarray:
    """How many numbers of their dtype two numbers are apart, for each pair."""
    assert str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
    assert ours.shape == tuple(theirs.shape)
    found = np.asarray(ours).view(np.int16).astype(np.int32)
    expected = theirs.detach().contiguous().view(torch.int16).numpy().astype(np.int32)
    # bits of negative floats count downwards from -0
    places = [np.where(bits < 0, -(bits & 0x7FFF), bits) for bits in (found, expected)]
    return np.abs(places[0] - places[1])
