"""`Tiles`: one way to run the fused kernel for dense products, and what a device can run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.tiles.device import Device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """One way to run the fused kernel.

    Attributes:
      block_m: tokens of a program: 8, 16, 32, 64 or 128.
      block_n: output features of a program: 64, 128 or 256.
      block_k: input features of one step along K, a multiple of the packed tile's.
      splits: into how many programs K is divided. Above 1 their sums go to memory in float32 and
        are added in order by XLA.
      warps: 32 threads each: 2, 4 or 8.
      stages: steps of the copy pipeline, 2 to 5.
      scale_on: "sum" multiplies each group's float32 sum, "weight" the 16-bit weight (the scale's
        dtype must be that of x).
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int = 1
    warps: int = 4
    stages: int = 3
    scale_on: str = "sum"


PREFILL = "prefill"
"""The schedule without tiles: expand the weight, then one plain product."""

Schedule = Tiles | str


def find_faults(
    tiles: Tiles, spec: QuantSpec, device: Device | None = None, scale_dtype: Any = jnp.float32
) -> list[str]:
    """Everything that keeps the fused kernel from running `tiles` on weights of `spec`.

    With a device, also whether they fit into its shared memory; the default dtype of the scales is
    the one that takes most of it.
    """
    faults = []
    for name, allowed in (
        ("block_m", (8, 16, 32, 64, 128)),
        ("block_n", (64, 128, 256)),
        ("warps", (2, 4, 8)),
        ("stages", (1, 2, 3, 4, 5)),
        ("scale_on", ("sum", "weight")),
    ):
        value = getattr(tiles, name)
        if type(value) is not type(allowed[0]) or value not in allowed:
            faults.append(f"{name} must be one of {allowed}, got {value!r}")
    if not _is_count(tiles.block_k) or tiles.block_k % spec.tile_k:
        faults.append(f"block_k must be a multiple of {spec.tile_k}, got {tiles.block_k!r}")
    if not _is_count(tiles.splits):
        faults.append(f"splits must be a positive integer, got {tiles.splits!r}")
    if device is not None and not faults:
        needed = measure_shared_memory(tiles, spec, scale_dtype)
        if needed > device.shared_memory:
            faults.append(
                f"{needed} bytes of shared memory are needed, {device.kind} has "
                f"{device.shared_memory}: lower stages, block_k or block_n"
            )
    return faults


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def fits(tiles: Tiles, spec: QuantSpec, scale_dtype, device: Device) -> bool:
    """Whether the shared memory of `device` holds a program of `tiles`."""
    return measure_shared_memory(tiles, spec, scale_dtype) <= device.shared_memory


def measure_shared_memory(tiles: Tiles, spec: QuantSpec, scale_dtype) -> int:
    """Bytes of shared memory one program takes at most, as the compiler was seen to lay it out.

    The words of a step wait in `stages` - 1 buffers and x in `stages`, since the tensor cores of
    sm_90 read x in place. A kilobyte is for scales that are being copied. If a slab may span two
    groups, each weight has a scale and a zero point of its own, which wait beside the words.
    """
    weights = tiles.block_n * tiles.block_k
    waiting = weights * spec.bits // 8
    if spec.is_mixed:
        waiting += weights * (jnp.dtype(scale_dtype).itemsize + (not spec.symmetric))
    x = tiles.block_m * tiles.block_k * 2
    return (tiles.stages - 1) * waiting + tiles.stages * x + 1024
