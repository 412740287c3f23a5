"""Callers' arguments as arrays, counts and dtypes; errors name the argument."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import SpecError

FLOAT_DTYPES = ("float16", "bfloat16", "float32")
"""The dtypes of activations, of scales and of everything that is not packed."""


def convert_array(name: str, value: Any) -> jax.Array:
    """Convert `value` to an array.

    Raises:
      SpecError: naming the argument, if that is impossible.
    """
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{name} must be an array, got {type(value).__name__}") from error


def read_count(name: str, value: Any) -> int:
    """Return `value` as an int, after checking that it is an integer of at least 0.

    Raises:
      SpecError: naming the argument, if it is not.
    """
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = -1
    if count < 0:
        raise SpecError(f"{name} must be an integer of at least 0, got {value!r}")
    return count


def check_float_dtype(name: str, value: Any) -> np.dtype:
    """Convert `value` to a float dtype.

    Raises:
      SpecError: naming the argument, unless it is float32, bfloat16 or float16.
    """
    try:
        dtype = None if value is None else jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in FLOAT_DTYPES:
        found = repr(value) if dtype is None else dtype.name
        raise SpecError(f"{name} must be float32, bfloat16 or float16, got {found}")
    return dtype
