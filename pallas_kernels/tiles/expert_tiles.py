"""`MoeTiles`: one way to run both products of experts, and what keeps a device from running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.tiles import Tiles, find_faults

Specs = tuple[QuantSpec, QuantSpec]
"""Of the first and the second weight of one expert."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeTiles:
    """One way to run both grouped products.

    Attributes:
      first: of gate and up.
      second: of down, with the same `block_m`.
      direct: each pair of a token and an expert is a block of its own. Nothing needs to be grouped
        then, but an expert that several tokens choose is read for each of them.
    """

    first: Tiles
    second: Tiles
    direct: bool = False


def find_moe_faults(
    tiles: MoeTiles,
    specs: Specs,
    device: Device | None = None,
    scale_dtypes: Sequence = (jnp.float32, jnp.float32),
) -> list[str]:
    """Everything that keeps the kernels from running `tiles` on experts of `specs`.

    With a device, also whether they fit into its shared memory, as in `find_faults`.
    """
    parts = (("first", tiles.first), ("second", tiles.second))
    faults = [
        f"{name}: {fault}"
        for (name, part), spec, scale_dtype in zip(parts, specs, scale_dtypes, strict=True)
        for fault in find_faults(part, spec, device, scale_dtype)
    ]
    if tiles.first.block_m != tiles.second.block_m:
        faults.append(
            f"block_m of both products must be the same, got {tiles.first.block_m} and "
            f"{tiles.second.block_m}"
        )
    return faults
