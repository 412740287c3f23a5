"""Which backend multiplies by packed weights on this machine, per dtype of the activations."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from jaxwna16.cli.arguments import DTYPES
from pallas_kernels.matmul import explain
from pallas_kernels.spec import QuantSpec


def spare_device_memory() -> None:
    """Keep JAX from taking most of a GPU's memory, for verbs that only look at the machine.

    Works until the first device is used; what the user has set stays.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def list_backends(widths: Iterable[int] = (4, 8)) -> list[dict[str, Any]]:
    """The choice of `quant_matmul` for weights of each number of bits, with the reason."""
    choices = []
    for bits in widths:
        spec = QuantSpec(bits=bits, group_size=-1, symmetric=True, in_features=64, out_features=64)
        for dtype in DTYPES:
            choice = explain(spec, dtype)
            found = {"backend": choice.backend, "reason": choice.reason}
            choices.append({"bits": bits, "dtype": dtype} | found)
    return choices


def word_backends(choices: list[dict[str, Any]]) -> list[str]:
    """One line for each backend and reason."""
    alike: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        dtypes = alike.setdefault((choice["backend"], choice["reason"]), [])
        if choice["dtype"] not in dtypes:
            dtypes.append(choice["dtype"])
    return [
        f"{backend} for {', '.join(dtypes)}: {reason}"
        for (backend, reason), dtypes in alike.items()
    ]
