"""Grouped products of experts, and the kernel that groups pairs, at small shapes.

Tiles are those that the rules choose for Qwen3-30B-A3B's 128 experts. Five small experts stand for
them: the first has more pairs than a block has rows, one has none, and some pairs have no expert.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.tiles.blocks import Blocks, count_blocks
from pallas_kernels.tiles.expert_rules import choose_moe
from pallas_kernels.tiles.expert_tiles import MoeTiles
from pallas_kernels.tiles.tiles import Tiles
from pallas_kernels.triton.dense import can_pair
from pallas_kernels.triton.grouped import Epilogue, multiply_blocks
from pallas_kernels.triton.grouping import group_few_pairs
from tests.executed.bounds import DTYPES, Bounded, find_rounding
from tests.executed.products import (
    add_splits,
    draw_bias,
    draw_weights,
    draw_x,
    find_device,
    take_leaves,
)
from tests.executed.work import Work
from tests.pallas_kernels.exact import Case

_EXPERTS, _TOP_K = 5, 2
_LARGE_EXPERTS, _LARGE_TOP_K = 128, 8


@dataclasses.dataclass(frozen=True)
class Experts:
    """One of the two products.

    Attributes:
      tokens: that the tiles are chosen for.
      first: gate and up, else down.
      apart: gate and up of interleaved or odd rows, which one program cannot pair.
    """

    arch: str
    tokens: int
    bits: int
    dtype: str
    group_size: int
    first: bool = True
    symmetric: bool = False
    apart: bool = False
    weigh: str = ""
    activation: str = ""
    bias: bool = False
    scale_dtype: str = ""
    splits: int = 1
    whole: bool = False

    @property
    def kind(self) -> str:
        return "experts"

    def choose(self) -> tuple[Tiles, bool]:
        """The tiles, and whether each pair is a block of its own."""
        hidden, inner = 2048, 768
        if self.group_size and 256 % self.group_size:
            hidden, inner = 1920, 960
        scales = self.scale_dtype or self.dtype
        specs = tuple(
            QuantSpec(
                bits=self.bits,
                group_size=self.group_size or k,
                symmetric=self.symmetric,
                in_features=k,
                out_features=n,
            )
            for n, k in ((2 * inner, hidden), (hidden, inner))
        )
        found: MoeTiles = choose_moe(
            specs,
            _LARGE_EXPERTS,
            self.tokens,
            _LARGE_TOP_K,
            self.dtype,
            (scales, scales),
            find_device(self.arch),
        )
        tiles = found.first if self.first else found.second
        return dataclasses.replace(tiles, splits=self.splits), found.direct

    def prepare(self) -> Work:
        """Draw the data and say what must come out."""
        tiles, direct = self.choose()
        paired = self.first and not self.apart and self._is_paired(tiles)
        stack = self._draw_stack(tiles, paired)
        spec = stack[0].spec
        local = draw_pairs(0 if direct else tiles.block_m)
        factors = self._draw_factors(local.size)
        # the second product has a row of x for each pair
        rows = local.size // _TOP_K if self.first else local.size
        x = draw_x((rows, spec.in_features), self.dtype, self.whole)
        bias = draw_bias((_EXPERTS, spec.out_features), self.dtype, self.whole)
        activation = "silu" if paired else self.activation or None
        epilogue = Epilogue(activation, paired, self.weigh or None)
        dtype = DTYPES["float32" if tiles.splits > 1 else self.dtype]
        there = np.flatnonzero(local < _EXPERTS)
        expected = self._bound(x, stack, local[there], there // (local.size // rows), tiles)
        expected = self._finish(expected, bias[local[there]], factors[there, None], epilogue)
        blocks = (local, None) if direct else group(local, _EXPERTS, tiles.block_m)
        return Work(
            functools.partial(_multiply, spec=spec, tiles=tiles, epilogue=epilogue, dtype=dtype),
            (x, _stack_leaves(stack, bias if self.bias else None), *blocks, factors),
            (expected.round_to(dtype),),
            functools.partial(_take_rows, splits=tiles.splits, rows=there),
            self.whole and activation is None,
        )

    def _draw_factors(self, count: int) -> np.ndarray:
        """Of pairs; powers of two where numbers are whole."""
        factors = np.random.default_rng(5).uniform(0.1, 1, count)
        return (np.exp2(np.round(4 * factors) - 2) if self.whole else factors).astype(np.float32)

    def _is_paired(self, tiles: Tiles) -> bool:
        half = QuantSpec(
            bits=self.bits,
            group_size=self.group_size or 2048,
            symmetric=self.symmetric,
            in_features=2048 if not self.group_size else 15 * 16 * self.group_size,
            out_features=tiles.block_n + 64,
        )
        scales = self.scale_dtype or self.dtype
        return tiles.splits == 1 and can_pair(half, tiles, scales, find_device(self.arch))

    def _draw_stack(self, tiles: Tiles, paired: bool) -> list[Case]:
        width = 2 * (tiles.block_n + 64) if paired else tiles.block_n + 72
        return draw_weights(self, [width] * _EXPERTS, tiles)

    def _bound(self, x, stack: list[Case], experts: np.ndarray, rows: np.ndarray, tiles: Tiles):
        """Each pair's row of x by its expert's weight."""
        spec = stack[0].spec
        rounded = find_rounding(self.dtype, tiles.scale_on, spec.is_mixed)
        each = [
            Bounded.multiply(
                x[row][None], stack[e].weight, spec.in_features + 2 + tiles.splits, rounded
            )
            for row, e in zip(rows, experts, strict=True)
        ]
        return Bounded(
            np.concatenate([one.value for one in each]), np.concatenate([one.error for one in each])
        )

    def _finish(self, sums: Bounded, bias, factors, epilogue: Epilogue) -> Bounded:
        """Weigh, add the bias, activate."""
        if self.weigh == "sum":
            sums = sums.times(factors)
        if self.bias:
            sums = sums.add(bias.astype(np.float64))
        if self.weigh == "result":
            sums = sums.times(factors)
        if epilogue.paired:
            gate, up = (
                Bounded(*halves)
                for halves in zip(
                    np.split(sums.value, 2, 1), np.split(sums.error, 2, 1), strict=True
                )
            )
            return gate.gate(up)
        return sums.square() if self.activation == "relu2" else sums


def _multiply(x, leaves, experts, pairs, factors, *, spec, tiles, interpret=False, **more):
    blocks = Blocks(experts, pairs)
    return multiply_blocks(x, leaves, spec, blocks, factors, tiles, interpret=interpret, **more)


def _stack_leaves(stack: list[Case], bias: np.ndarray | None) -> dict[str, np.ndarray]:
    each = [take_leaves(weight) for weight in stack]
    leaves = {name: np.stack([leaf[name] for leaf in each]) for name in each[0]}
    return leaves if bias is None else {**leaves, "bias": bias}


def _take_rows(output: np.ndarray, splits: int, rows: np.ndarray) -> np.ndarray:
    return add_splits(output, splits)[rows]


def draw_pairs(block: int) -> np.ndarray:
    """Experts of an even number of pairs: one with more than `block`, one with none."""
    rng = np.random.default_rng(block)
    local = rng.choice([0, 1, 3, 4, _EXPERTS], block + 6)
    local[: block + 2] = 1
    return rng.permutation(local).astype(np.int32)


def group(local: np.ndarray, experts: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """What `pallas_kernels.tiles.blocks.group_pairs` says, written once more."""
    count = count_blocks(local.size, experts, block)
    numbers = np.full(count, experts, np.int32)
    pairs = np.full((count, block), local.size, np.int32)
    place = 0
    for expert in range(experts):
        mine = np.flatnonzero(local == expert)
        for start in range(0, mine.size, block):
            rows = mine[start : start + block]
            numbers[place], pairs[place, : rows.size] = expert, rows
            place += 1
    return numbers, pairs


@dataclasses.dataclass(frozen=True)
class Grouping:
    """The kernel that groups few pairs by expert."""

    arch: str
    experts: int
    pairs: int
    block: int

    @property
    def kind(self) -> str:
        return "grouping"

    def prepare(self) -> Work:
        """Whole numbers, all of which must be right but for rows of blocks past the last."""
        rng = np.random.default_rng(self.pairs)
        local = rng.integers(0, self.experts + 1, self.pairs).astype(np.int32)
        local[: self.pairs // 3] = 1 % self.experts
        numbers, pairs = group(local, self.experts, self.block)

        def run(local, interpret=False):
            return tuple(group_few_pairs(local, self.experts, self.block, interpret=interpret))

        used = int((numbers < self.experts).sum()) * self.block

        def take(output: np.ndarray) -> np.ndarray:
            return output if output.size == numbers.size else output.reshape(-1)[:used]

        expected = (numbers, pairs.reshape(-1)[:used])
        return Work(run, (jnp.asarray(local),), expected, take, True)
