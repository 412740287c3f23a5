"""The float dtypes that a user may ask for."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxwna16.errors import InputError

_FLOATS = ("float32", "bfloat16", "float16")


def read_dtype(dtype: Any) -> np.dtype | None:
    """A dtype that floats can be cast to, by its name or as NumPy and JAX write it; None is None.

    Raises:
      InputError: if it is another: wider ones would be cut to float32, integers need a scale.
    """
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in _FLOATS:
        raise InputError(f"dtype: expected one of {', '.join(_FLOATS)}, got {dtype!r}")
    return found
