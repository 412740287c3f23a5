"""Small tables of tuned tiles."""

from __future__ import annotations

import dataclasses

from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.entries import Entry, MoeEntry, TileTable
from pallas_kernels.tiles.expert_tiles import MoeTiles
from pallas_kernels.tiles.tiles import Schedule, Tiles

H200 = Device("NVIDIA H200", 132)
TILES = Tiles(block_m=16, block_n=128, block_k=128, splits=3, stages=4)
SMALL = Tiles(block_m=8, block_n=128, block_k=128)
FEW = MoeTiles(first=SMALL, second=dataclasses.replace(SMALL, splits=2))
WIDE = dataclasses.replace(TILES, block_m=64, block_n=256, warps=8)


def make_spec(k=4096, n=4096, *, bits=4, group_size=128) -> QuantSpec:
    return QuantSpec(
        bits=bits, group_size=group_size, symmetric=False, in_features=k, out_features=n
    )


def make_entry(k=4096, n=4096, tokens=16, schedule: Schedule = TILES, **changes) -> Entry:
    facts = {"bits": 4, "group_size": 128, "x_dtype": "bfloat16", **changes}
    return Entry(in_features=k, out_features=n, tokens=tokens, schedule=schedule, **facts)


def make_moe_specs(hidden=2048, middle=768, **facts) -> tuple[QuantSpec, QuantSpec]:
    return make_spec(hidden, 2 * middle, **facts), make_spec(middle, hidden, **facts)


def make_moe_entry(tokens=64, schedule: MoeTiles = FEW, **changes) -> MoeEntry:
    sizes = {"hidden": 2048, "intermediate": 768, "experts": 128, "top_k": 8}
    facts = {"bits": 4, "group_size": 128, "x_dtype": "bfloat16", **sizes, **changes}
    return MoeEntry(tokens=tokens, schedule=schedule, **facts)


def make_table(*entries: Entry | MoeEntry, kind: str = H200.kind) -> TileTable:
    return TileTable(
        device_kind=kind,
        entries=tuple(entry for entry in entries if isinstance(entry, Entry)),
        made={"jax": "0.10.2", "date": "today"},
        experts=tuple(entry for entry in entries if isinstance(entry, MoeEntry)),
    )
