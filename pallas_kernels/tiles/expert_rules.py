"""How the two products of a Mixture-of-Experts are divided among the cores of a GPU.

A block has as many rows as an expert gets on average, so that few are padding. Each block reads the
weight of its expert, so reading is the cost while there are few tokens, as in a dense product. In
contrast to it, every expert has programs of its own: K is split only if so few experts are chosen
that some cores would be idle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pallas_kernels.format.spec import TILE_N, QuantSpec
from pallas_kernels.tiles.dense_rules import (
    add_splits,
    can_take_128,
    choose_tiles,
    count_columns,
    get_fixed,
)
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.expert_tiles import MoeTiles, Specs, find_moe_faults
from pallas_kernels.tiles.tables import load_moe_schedule
from pallas_kernels.tiles.tiles import Tiles

_BLOCKS = (8, 16, 32, 64, 128)
_FEWEST = _BLOCKS[0]
_FILLED = 0.9
_MANY_EXPERTS = 4


def choose_moe(
    specs: Specs,
    experts: int,
    tokens: int,
    top_k: int,
    x_dtype,
    scale_dtypes: Sequence,
    device: Device,
    *,
    gated: bool = True,
) -> MoeTiles:
    """The tiles of both products: fixed ones, else from the device's table, else by rule.

    Args:
      specs: of the first and the second weight of one expert.
      experts: E.
      tokens: T >= 1.
      top_k: experts of each token.
      x_dtype: bfloat16 or float16.
      scale_dtypes: of the scales of both weights.
      device: the GPU it is for.
      gated: whether the first weight is gate and up. A table has only such experts.

    Raises:
      TableError: if the device has a table and it cannot be used.
    """
    fixed = get_fixed(MoeTiles)
    if fixed is not None:
        return fixed
    if gated:
        facts = (specs, experts, tokens, top_k, x_dtype, scale_dtypes)
        tuned = load_moe_schedule(device, *facts)
        if tuned is not None:
            return tuned
    rule = _Rule(specs, experts, tokens * top_k, x_dtype, scale_dtypes, device, gated)
    return rule.choose(tokens)


def describe_moe(tiles: MoeTiles) -> str:
    """The tiles in words."""
    grouping = "a block for each pair" if tiles.direct else f"blocks of {tiles.first.block_m} rows"
    parts = (("first", tiles.first), ("second", tiles.second))
    words = [
        f"{name} {part.block_n} features x {part.block_k} of K, "
        f"{part.splits} split{'s' * (part.splits > 1)}, {part.warps} warps, {part.stages} stages, "
        f"scale on the {part.scale_on}"
        for name, part in parts
    ]
    return "; ".join([grouping, *words])


def list_moe_candidates(
    specs: Specs,
    experts: int,
    tokens: int,
    top_k: int,
    x_dtype,
    scale_dtypes: Sequence,
    device: Device,
) -> list[MoeTiles]:
    """The tiles worth timing for gated experts, the rule's choice first, each once.

    With the rows of a block fixed, the two products do not influence each other. So one thing at a
    time is varied around the rule's choice, and `combine` joins the best of both.
    """
    rule = _Rule(specs, experts, tokens * top_k, x_dtype, scale_dtypes, device, gated=True)
    best = rule.choose(tokens)
    found = [best]
    # with as many pairs as experts, a chosen expert has 1.6 pairs on average
    if tokens > 1 and rule.pairs <= experts:
        found.append(rule.build(rule.choose_block() if best.direct else _FEWEST, not best.direct))
    if not best.direct:
        place = _BLOCKS.index(best.first.block_m)
        near = _BLOCKS[max(0, place - 1) : place + 2]
        found += [rule.build(block_m, False) for block_m in near if rule.can_take(block_m)]
    strip = specs[0].tiles_n * TILE_N // (2 if can_pair_rows(specs[0], True) else 1)
    firsts = _vary(best.first, specs[0], strip, rule.split_first)
    seconds = _vary(best.second, specs[1], specs[1].tiles_n * TILE_N, rule.split_second)
    found += [dataclasses.replace(best, first=first) for first in firsts]
    found += [dataclasses.replace(best, second=second) for second in seconds]
    fitting = [tiles for tiles in found if not find_moe_faults(tiles, specs, device, scale_dtypes)]
    return list(dict.fromkeys(fitting))


def combine(rule: MoeTiles, seconds: Sequence[tuple[MoeTiles, float]]) -> list[MoeTiles]:
    """Combinations of the two fastest tiles of each product that were not timed yet.

    Args:
      rule: the rule's choice, around which the others vary.
      seconds: the tiles that were timed, and their times.
    """
    ordered = [tiles for tiles, _ in sorted(seconds, key=lambda one: one[1])]
    alike = [tiles for tiles in ordered if tiles.direct == rule.direct]
    firsts = [tiles.first for tiles in alike if tiles.second == rule.second][:2]
    others = [tiles.second for tiles in alike if tiles.first == rule.first][:2]
    pairs = [
        MoeTiles(first=first, second=second, direct=rule.direct)
        for first in firsts
        for second in others
    ]
    return [tiles for tiles in pairs if tiles not in ordered]


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The rule of thumb for one call; `pairs` are tokens times top_k, else see `choose_moe`."""

    specs: Specs
    experts: int
    pairs: int
    x_dtype: Any
    scale_dtypes: Sequence
    device: Device
    gated: bool

    def choose(self, tokens: int) -> MoeTiles:
        direct = tokens == 1 or _MANY_EXPERTS * self.pairs <= self.experts
        return self.build(_FEWEST if direct else self.choose_block(), direct)

    def choose_block(self) -> int:
        block_m = choose_block(self.pairs, self.experts)
        return block_m if self.can_take(block_m) else 64

    def can_take(self, block_m: int) -> bool:
        fitting = [can_take_128(self.x_dtype, s, self.device) for s in self.scale_dtypes]
        return block_m < 128 or all(fitting)

    def build(self, block_m: int, direct: bool) -> MoeTiles:
        first, second = (
            choose_tiles(spec, block_m, self.x_dtype, scale_dtype, self.device)
            for spec, scale_dtype in zip(self.specs, self.scale_dtypes, strict=True)
        )
        return MoeTiles(
            first=self.split_first(first), second=self.split_second(second), direct=direct
        )

    def split_first(self, tiles: Tiles) -> Tiles:
        columns = count_columns(self.specs[0], tiles)
        columns //= 2 if can_pair_rows(self.specs[0], self.gated) else 1
        # a split first product needs a pass of its own for the activation
        if tiles.block_m > 64 or self._chosen * columns >= self.device.cores:
            return dataclasses.replace(tiles, splits=1)
        return add_splits(tiles, self.specs[0], self.device, self._chosen)

    def split_second(self, tiles: Tiles) -> Tiles:
        if tiles.block_m > 64:
            return dataclasses.replace(tiles, splits=1)
        return add_splits(tiles, self.specs[1], self.device, self._chosen)

    @property
    def _chosen(self) -> int:
        """How many experts are chosen, at most."""
        return min(self.pairs, self.experts)


def _vary(
    tiles: Tiles, spec: QuantSpec, features: int, split: Callable[[Tiles], Tiles]
) -> Iterator[Tiles]:
    """`tiles` with one thing changed.

    Args:
      features: N of the weight, or half of it if one program computes gate and up.
      split: divides K again for the changed tile.
    """
    block_m = tiles.block_m
    shapes = ((64, 2), (64, 4), (128, 2), (128, 4), (128, 8), (256, 4), (256, 8))
    for block_n, warps in shapes:
        # more sums than these do not fit into registers
        if block_n <= features and block_m * block_n <= 64 * 64 * warps:
            yield split(dataclasses.replace(tiles, block_n=block_n, warps=warps))
    for per_step in (1, 2, 4) if spec.bits == 8 else (1, 2):
        if spec.tiles_k % per_step == 0 and block_m * per_step <= 32:
            yield split(dataclasses.replace(tiles, block_k=spec.tile_k * per_step))
    for stages in (3, 4):
        yield dataclasses.replace(tiles, stages=stages)
    steps = -(-spec.tiles_k * spec.tile_k // tiles.block_k)
    for splits in {tiles.splits // 2, 2 * tiles.splits} - {0}:
        per_split = -(-steps // splits)
        if block_m <= 64 and splits <= steps:
            yield dataclasses.replace(tiles, splits=-(-steps // per_split))


def choose_block(pairs: int, experts: int) -> int:
    """Rows of a block: the smallest size that an average expert does not fill."""
    return next((b for b in _BLOCKS if pairs < _FILLED * experts * b), _BLOCKS[-1])


def can_pair_rows(spec: QuantSpec, gated: bool) -> bool:
    """Whether gate and up both start at a packed tile, so that one program can read both."""
    return gated and spec.out_features % (2 * TILE_N) == 0
