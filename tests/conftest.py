"""Every test runs under JAX's strict rules: nothing is promoted, neither in dtype nor in rank."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
