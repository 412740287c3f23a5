"""The float dtypes that a user may ask for."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxwna16.errors import InputError
from pallas_kernels import arguments
from pallas_kernels.errors import SpecError


def read_dtype(dtype: Any) -> np.dtype | None:
    """Read a float dtype, given by name or as a dtype of NumPy or JAX; None stays None.

    Raises:
      InputError: if it is another dtype: JAX would cut wider floats to float32, and integers need a
        scale.
    """
    try:
        return None if dtype is None else arguments.check_float_dtype("dtype", dtype)
    except SpecError as error:
        raise InputError(str(error)) from None


def choose_dtype(dtype: str) -> str | None:
    """The dtype for `load_model` that `--dtype` asks for."""
    if dtype != "auto":
        return dtype
    # most CPUs compute in 16 bits far more slowly than in 32
    return "float32" if jax.default_backend() == "cpu" else None
