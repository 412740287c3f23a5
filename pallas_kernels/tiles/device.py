"""The GPU that a function is traced for: the few facts that decide its tiles."""

from __future__ import annotations

import dataclasses
import re

import jax

_AMPERE = ("A30", "A100", "A800")
_HOPPER = ("H20", "H100", "H200", "H800", "GH200")
_BLACKWELL = ("B100", "B200", "B300", "GB200", "GB300")


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU model.

    Attributes:
      kind: the name its driver gives ("NVIDIA H200"); tables of tuned tiles are keyed by it.
      cores: how many streaming multiprocessors it has.
    """

    kind: str
    cores: int

    @property
    def is_hopper(self) -> bool:
        """Whether its tensor cores take one operand from registers and 128 tokens at once."""
        return self._is_one_of(_HOPPER)

    @property
    def is_blackwell(self) -> bool:
        """Whether its tensor cores have a memory of their own for sums."""
        return self._is_one_of(_BLACKWELL)

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one program can have; the least of all for unknown kinds.

        Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
        """
        if self._is_one_of(_HOPPER + _BLACKWELL):
            return 227 * 1024
        return (163 if self._is_one_of(_AMPERE) else 99) * 1024

    def _is_one_of(self, models: tuple[str, ...]) -> bool:
        return any(name in models for name in re.findall(r"[A-Z]+\d+", self.kind))


UNKNOWN = Device("unknown", 132)
"""Stands for an absent GPU that nobody described."""


def find_device() -> Device:
    """The GPU of the abstract mesh in use, else of this machine, else `UNKNOWN`."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None and described.platform in ("cuda", "gpu"):
        return Device(described.device_kind, described.num_cores or UNKNOWN.cores)
    if jax.default_backend() != "gpu":
        return UNKNOWN
    device = jax.devices()[0]
    return Device(device.device_kind, device.core_count or UNKNOWN.cores)
