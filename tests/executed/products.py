"""Dense products, and the kernel that expands a weight, at shapes small enough to execute.

Tiles are those that the rules choose for a 4096 x 4096 weight on the GPU in question, or the tuned
ones of its table. The weight is as small as lets every part of the code run: three steps of the
copy pipeline and one that ends within a step, in each part of a split sum; two tiles of features,
the second one past the end of N.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.tiles.dense_rules import choose
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.tiles import Tiles
from pallas_kernels.triton.dense import can_pair, expand_by_kernel, multiply_packed
from tests import gpu_aot
from tests.executed.bounds import DTYPES, Bounded, find_rounding
from tests.executed.work import Work
from tests.pallas_kernels.exact import Case, make_case

LARGE = 4096


def find_device(arch: str) -> Device:
    target = gpu_aot.TARGETS[arch]
    return Device(target.device_kind, target.cores)


def choose_depth(group_size: int, tiles: Tiles) -> int:
    """K of three steps and a part of one for each split."""
    unit = math.lcm(group_size or 8, 4)
    least = 3 * tiles.splits * tiles.block_k + 1
    depth = unit * -(-least // unit)
    return depth + unit if depth % tiles.block_k == 0 else depth


@dataclasses.dataclass(frozen=True)
class Product:
    """One dense product.

    Attributes:
      group_size: 0 for channels.
      scale_dtype: "" for that of x.
      joined: two more weights of other sizes, as q, k and v.
      tiles: None for the rule's choice.
      whole: whole numbers, whose sums are exact.
    """

    arch: str
    tokens: int
    bits: int
    dtype: str
    group_size: int
    symmetric: bool = False
    gated: bool = False
    joined: bool = False
    bias: bool = False
    scale_dtype: str = ""
    splits: int = 1
    tiles: Tiles | None = None
    whole: bool = False

    @property
    def kind(self) -> str:
        return "product"

    def choose(self) -> Tiles:
        """The rule's tiles for a large weight, with the splits of this case."""
        if self.tiles is not None:
            return self.tiles
        size = LARGE if not self.group_size else self.group_size * (LARGE // self.group_size)
        spec = QuantSpec(
            bits=self.bits,
            group_size=self.group_size or size,
            symmetric=self.symmetric,
            in_features=size,
            out_features=LARGE,
        )
        scales = self.scale_dtype or self.dtype
        tiles = choose(spec, self.tokens, self.dtype, scales, find_device(self.arch))
        if not isinstance(tiles, Tiles):
            raise ValueError(f"{self} is prefill")
        return dataclasses.replace(tiles, splits=self.splits)

    def prepare(self) -> Work:
        """Draw the data and say what must come out."""
        tiles = self.choose()
        weights = self._draw_weights(tiles)
        specs = [weight.spec for weight in weights]
        x = draw_x((self.tokens, specs[0].in_features), self.dtype, self.whole)
        biases = [self._draw_bias(spec) for spec in specs]
        leaves = [take_leaves(*both) for both in zip(weights, biases, strict=True)]
        return Work(
            functools.partial(_multiply, specs=specs, tiles=tiles, gated=self.gated),
            (x, leaves),
            self._expect(x, weights, biases, tiles),
            functools.partial(add_splits, splits=tiles.splits),
            self.whole and not self.gated,
        )

    def _draw_weights(self, tiles: Tiles) -> list[Case]:
        return draw_weights(self, self._list_widths(tiles), tiles)

    def _draw_bias(self, spec: QuantSpec) -> np.ndarray | None:
        return draw_bias((spec.out_features,), self.dtype, self.whole) if self.bias else None

    def _expect(self, x, weights: list[Case], biases: list, tiles: Tiles) -> tuple[Bounded, ...]:
        """Of each output; sums of a split are without bias and activation."""
        sums = [self._bound(x, weight, tiles) for weight in weights]
        if tiles.splits > 1:
            return tuple(sums)
        sums = [
            total if bias is None else total.add(bias)
            for total, bias in zip(sums, biases, strict=True)
        ]
        if self.gated and self._is_paired(weights[0].spec, tiles):
            sums = [sums[0].gate(sums[1])]
        return tuple(total.round_to(self.dtype) for total in sums)

    def _list_widths(self, tiles: Tiles) -> list[int]:
        width = tiles.block_n + 72
        if self.gated:
            return [width, width]
        return [width, 64, 100] if self.joined else [width]

    def _is_paired(self, spec: QuantSpec, tiles: Tiles) -> bool:
        scales = self.scale_dtype or self.dtype
        return can_pair(spec, tiles, scales, find_device(self.arch))

    def _bound(self, x: np.ndarray, weight: Case, tiles: Tiles) -> Bounded:
        rounded = find_rounding(self.dtype, tiles.scale_on, weight.spec.is_mixed)
        count = weight.spec.in_features + 2 + tiles.splits
        return Bounded.multiply(x, weight.weight, count, rounded)


def _multiply(x, leaves, *, specs, tiles: Tiles, gated: bool, interpret: bool = False):
    activation = "silu" if gated else None
    return multiply_packed(x, leaves, specs, tiles, activation=activation, interpret=interpret)


def draw_weights(case: Any, widths: list[int], tiles: Tiles) -> list[Case]:
    """Weights of these N, each with numbers of its own."""
    depth = choose_depth(case.group_size, tiles)
    return [
        make_case(
            (width, depth),
            case.group_size or depth,
            case.bits,
            symmetric=case.symmetric,
            scale_dtype=DTYPES[case.scale_dtype or case.dtype],
            seed=seed,
            whole=case.whole,
        )
        for seed, width in enumerate(widths)
    ]


def take_leaves(weight: Case, bias: np.ndarray | None = None) -> dict[str, np.ndarray]:
    leaves = {"packed": weight.packed, "scale": weight.scale, "zero_point": weight.zero_point}
    leaves["bias"] = bias
    return {name: leaf for name, leaf in leaves.items() if leaf is not None}


def draw_x(shape: tuple[int, int], dtype: str, whole: bool, seed: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.integers(-4, 5, shape) if whole else rng.standard_normal(shape)).astype(
        DTYPES[dtype]
    )


def draw_bias(shape: tuple[int, ...], dtype: str, whole: bool) -> np.ndarray:
    rng = np.random.default_rng(11)
    return (rng.integers(-8, 9, shape) if whole else rng.standard_normal(shape)).astype(
        DTYPES[dtype]
    )


def add_splits(output: np.ndarray, splits: int) -> np.ndarray:
    """Float32 sums of parts, added without an error of their own."""
    return output.astype(np.float64).sum(0) if splits > 1 else output


@dataclasses.dataclass(frozen=True)
class Expansion:
    """The kernel that expands a weight before prefill."""

    arch: str
    bits: int
    dtype: str
    group_size: int
    symmetric: bool = False
    scale_dtype: str = ""

    @property
    def kind(self) -> str:
        return "expansion"

    def prepare(self) -> Work:
        """(q - z) * s in float32, rounded once more: to the bit."""
        depth = (self.group_size or 200) * -(-200 // (self.group_size or 200))
        weight = make_case(
            (100, depth),
            self.group_size or depth,
            self.bits,
            symmetric=self.symmetric,
            scale_dtype=DTYPES[self.scale_dtype or self.dtype],
        )

        def run(leaves, interpret=False):
            return expand_by_kernel(leaves, weight.spec, DTYPES[self.dtype], interpret=interpret)

        expected = weight.weight.astype(np.float32).astype(DTYPES[self.dtype])
        return Work(run, (take_leaves(weight),), (expected,), lambda output: output, True)
