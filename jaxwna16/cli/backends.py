"""Which backend multiplies by packed weights on this machine, and with which tiles."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import jax

from jaxwna16.cli.arguments import DTYPES
from pallas_kernels.backends import explain
from pallas_kernels.format.spec import QuantSpec

_TYPICAL = QuantSpec(bits=4, group_size=128, symmetric=False, in_features=4096, out_features=4096)
_FACTS = ("bits", "group_size", "symmetric", "in_features", "out_features")
_TOKENS = (1, 16, 64, 256, 2048)


def spare_device_memory() -> None:
    """Keep JAX from taking most of a GPU's memory, for verbs that only look at the machine.

    This works until the first device is used. It does not override the user's own setting.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def describe_lack_of_devices() -> str:
    """The reason why JAX can use no device; "" if it can use one."""
    try:
        jax.devices()
    except RuntimeError as error:
        return f"JAX cannot use any device: {error}"
    return ""


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


def word_choices(
    rows: list[dict[str, Any]], choices: list[dict[str, Any]], dtype: str
) -> list[str]:
    """One line for each backend and reason; it names its modules if it is not for all of them.

    Args:
      rows: the modules, as `inspect` reports them, each with its backend for `dtype`.
      choices: of `list_backends`, for other dtypes.
      dtype: the checkpoint's.
    """
    alike: dict[tuple[str | None, str], list[str]] = {}
    for row in rows:
        alike.setdefault((row["backend"], row["reason"]), []).append(row["modules"])
    if not choices:
        return list(dict.fromkeys(reason for _, reason in alike))
    if len(alike) < 2:
        return word_backends(choices)
    lines = [
        f"{backend or 'none'} for {', '.join(dict.fromkeys(patterns))} in {dtype}: {reason}"
        for (backend, reason), patterns in alike.items()
    ]
    return lines + word_backends([choice for choice in choices if choice["dtype"] != dtype])


def list_schedules(platform: str | None = None) -> list[dict[str, Any]]:
    """How the fused kernel divides a typical product for a few numbers of tokens, by dtype.

    Args:
      platform: as in `explain`.

    Returns:
      An entry for each dtype that the kernel serves on this platform, so none without a GPU.

    Raises:
      TableError: if this GPU has a table of tuned tiles that cannot be used.
    """
    facts = {name: getattr(_TYPICAL, name) for name in _FACTS}
    return [
        {**facts, "dtype": dtype, "tokens": tokens, "schedule": choice.schedule}
        for dtype in DTYPES
        for tokens in _TOKENS
        if (choice := explain(_TYPICAL, dtype, platform=platform, tokens=tokens)).schedule
    ]


def word_schedules(schedules: list[dict[str, Any]]) -> list[str]:
    """One line for each number of tokens; dtypes with the same schedule share a line."""
    from jaxwna16.cli.screen import count

    alike: dict[tuple[str, str], list[str]] = {}
    for entry in schedules:
        product = (
            f"W{entry['bits']} g{entry['group_size']} "
            f"{entry['out_features']} x {entry['in_features']}, {count(entry['tokens'], 'token')}"
        )
        alike.setdefault((product, entry["schedule"]), []).append(entry["dtype"])
    return [
        f"{product} of {', '.join(dtypes)}: {schedule}"
        for (product, schedule), dtypes in alike.items()
    ]
