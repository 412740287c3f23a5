"""Whether a checkpoint can fit, asked before anything is read. Refuses only what is impossible."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from loaders.errors import CheckpointError, Fault

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# version of control groups -> files with the limit and the use, prefix of the fields of memory.stat
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = ("memory.max", "memory.current", "")


def require_memory(folder: Path, arrays: int, beside: int) -> None:
    """Refuse a checkpoint whose arrays alone are larger than the memory that they go to.

    That is the memory of JAX's default device. The memory for reading does not count: it is an
    upper bound, and a checkpoint that might just fit is not refused.

    Args:
      folder: the checkpoint.
      arrays: bytes that will be held at the end.
      beside: bytes that reading takes on the host at most.

    Raises:
      CheckpointError: if it is too large.
    """
    device = next(iter(jnp.zeros(()).devices()))
    available = find_available(device)
    if available is None or arrays <= available:
        return
    what = (
        f"its arrays take {_describe(arrays)}, and reading them up to {_describe(beside)} more; "
        f"{_describe(available)} are available on {device.platform}"
    )
    way_out = "free memory, or use a machine or a device with more"
    raise CheckpointError(folder, [Fault(what, way_out=way_out)])


def find_available(device: Any) -> int | None:
    """Bytes that can still be had on a device; None if it does not say.

    Of a CPU, they count what the kernel can take back from caches, and swap.
    """
    if device.platform == "cpu":
        return _find_on_host()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def _find_on_host() -> int | None:
    fields = _read_fields(_PROC / "meminfo", scale=1024)
    if "MemAvailable:" not in fields:
        return None
    return min([fields["MemAvailable:"], *_list_in_groups()]) + fields.get("SwapFree:", 0)


def _list_in_groups() -> Iterator[int]:
    """What every control group that this process is in leaves to it (containers have them)."""
    for line in _read(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _GROUPS / "memory" if controllers else _GROUPS
        limit, use, prefix = _V1 if controllers else _V2
        group = root / path.lstrip("/")
        for level in (group, *group.parents):
            if level.is_relative_to(root) and (text := _read(level / limit).strip()).isdigit():
                held = int(_read(level / use).strip() or 0)
                cached = _read_fields(level / "memory.stat")
                files = (cached.get(f"{prefix}{kind}active_file", 0) for kind in ("", "in"))
                yield int(text) - held + sum(files)


def _read_fields(path: Path, scale: int = 1) -> dict[str, int]:
    """The fields of a file with lines of a name and a number."""
    rows = (line.split() for line in _read(path).splitlines())
    return {row[0]: int(row[1]) * scale for row in rows if len(row) > 1 and row[1].isdigit()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def _describe(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
