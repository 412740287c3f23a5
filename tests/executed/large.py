"""The last block of the last expert of large models, at full size.

Offsets in these stacks pass 2^31. Memory is there only where that block must touch it, so a wrong
offset is a fault. Executed are its first and its last tile of features, in the last part of K.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.format.spec import TILE_N, QuantSpec
from pallas_kernels.format.weights import make_abstract
from pallas_kernels.tiles.blocks import Blocks, count_blocks
from pallas_kernels.tiles.expert_rules import can_pair_rows, choose_moe
from pallas_kernels.tiles.tiles import Tiles
from pallas_kernels.triton.dense import can_pair, choose_block_n
from pallas_kernels.triton.grouped import Epilogue, multiply_blocks
from tests import gpu_aot
from tests.executed.bounds import DTYPES, Bounded, find_rounding
from tests.executed.products import find_device
from tests.ptx.faults import EarlyRead
from tests.ptx.launch import Launch, compile_launch
from tests.ptx.memory import Part

MODELS = {
    "Kimi-K2": (384, 7168, 2048, 8, 32),
    "DeepSeek-V3": (256, 7168, 2048, 8, 128),
    "Qwen3.5-397B": (512, 4096, 1024, 10, 128),
}
"""Experts, hidden, inner, top_k; and the groups of a checkpoint of 4 bits."""
_DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True)
class LastBlock:
    """One of the two products of a model."""

    arch: str
    model: str
    tokens: int
    first: bool

    @property
    def kind(self) -> str:
        return "last block"

    def prepare(self) -> LastWork:
        experts, hidden, inner, top_k, group = MODELS[self.model]
        specs = tuple(
            QuantSpec(bits=4, group_size=group, symmetric=False, in_features=k, out_features=n)
            for n, k in ((2 * inner, hidden), (hidden, inner))
        )
        device = find_device(self.arch)
        scales = (DTYPES[_DTYPE],) * 2
        found = choose_moe(specs, experts, self.tokens, top_k, _DTYPE, scales, device)
        tiles, spec = (found.first, specs[0]) if self.first else (found.second, specs[1])
        paired = self.first and tiles.splits == 1 and can_pair_rows(spec, True)
        paired = paired and can_pair(spec, tiles, scales[0], device)
        return LastWork(self, spec, tiles, paired, found.direct)


@dataclasses.dataclass(frozen=True)
class LastWork:
    """What to execute, as `tests.executed.work.Work`."""

    case: LastBlock
    spec: QuantSpec
    tiles: Tiles
    paired: bool
    direct: bool

    @property
    def _experts(self) -> int:
        return MODELS[self.case.model][0]

    @property
    def _pairs(self) -> int:
        return self.case.tokens * MODELS[self.case.model][3]

    @property
    def _rows(self) -> int:
        """Of x."""
        return self.case.tokens if self.case.first else self._pairs

    @property
    def _features(self) -> int:
        return self.spec.out_features // (2 if self.paired else 1)

    @property
    def _block_n(self) -> int:
        return choose_block_n(
            dataclasses.replace(self.spec, out_features=self._features), self.tiles
        )

    @property
    def _count(self) -> int:
        pairs = self._pairs
        return pairs if self.direct else count_blocks(pairs, self._experts, self.tiles.block_m)

    @property
    def _mine(self) -> np.ndarray:
        """The pairs of the last block: the last of all."""
        return np.arange(self._pairs - (1 if self.direct else self.tiles.block_m), self._pairs)

    def compile(self, arch: str) -> Launch:
        tiles, weigh = self.tiles, None if self.case.first else "result"
        epilogue = Epilogue("silu" if self.paired else None, self.paired, weigh)
        wide = tiles.splits > 1 or (not self.case.first and self.case.tokens <= 256)

        def run(x, stack, experts, pairs, factors):
            return multiply_blocks(
                x,
                stack,
                self.spec,
                Blocks(experts, pairs),
                factors,
                tiles,
                epilogue=epilogue,
                dtype=DTYPES["float32" if wide else _DTYPE],
            )

        def shape(*sizes: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, dtype)

        return compile_launch(
            run,
            shape(self._rows, self.spec.in_features, dtype=DTYPES[_DTYPE]),
            make_abstract(self.spec, DTYPES[_DTYPE], experts=self._experts),
            shape(self._count),
            None if self.direct else shape(self._count, tiles.block_m),
            shape(self._pairs, dtype=jnp.float32),
            arch=arch,
        )

    def run_noting_early(self, launch: Launch) -> tuple[list[np.ndarray], int, bool]:
        """As `tests.executed.work.Work.run_noting_early`."""
        try:
            return *self.run(launch), False
        except EarlyRead:
            return *self.run(dataclasses.replace(launch, early=True)), True

    def run(self, launch: Launch) -> tuple[list[np.ndarray], int]:
        """The rows of the last block; features that were not computed are NaN."""
        kernel, places = launch.load(), -(-self._features // self._block_n)
        split = self.tiles.splits - 1
        start = (split * self._count + self._count - 1) * places
        inputs = self._list_inputs()
        output = launch.make_output(0).reshape(-1, self._features)[-len(self._mine) :].copy()
        offset = launch.make_output(0).nbytes - output.nbytes
        [(found, _)] = kernel.run(
            [inputs[number] for number in launch.operands],
            [Part(output, offset)],
            sorted({start, start + places - 1}),
        )
        return [found], kernel.steps

    def measure(self, outputs: list[np.ndarray]) -> float:
        """The worst error over its bound, in both tiles."""
        ends = (0, self.spec.tiles_n * TILE_N // (2 if self.paired else 1) - self._block_n)
        return max(self._measure_tile(outputs[0], start) for start in ends)

    def _measure_tile(self, output: np.ndarray, start: int) -> float:
        x, factors, leaves = self._draw()
        columns = start + np.arange(self._block_n)
        starts = (columns, self._features + columns) if self.paired else (columns,)
        first = self._find_first_feature()
        rows = x[self._mine // (self._pairs // self._rows) - self._find_first_row()][:, first:]
        rounded = find_rounding(_DTYPE, self.tiles.scale_on, self.spec.is_mixed)
        sums = [
            Bounded.multiply(rows, self._decode(leaves, c)[:, first:], rows.shape[1] + 3, rounded)
            for c in starts
        ]
        total = sums[0].gate(sums[1]) if self.paired else sums[0]
        if not self.case.first:
            total = total.times(factors[self._mine, None])
        return total.round_to(output.dtype).measure(output[:, columns])

    def _find_first_row(self) -> int:
        return int(self._mine[0]) // (self._pairs // self._rows)

    def _find_first_feature(self) -> int:
        """Of the last part of K."""
        steps = -(-self.spec.tiles_k * self.spec.tile_k // self.tiles.block_k)
        return (self.tiles.splits - 1) * -(-steps // self.tiles.splits) * self.tiles.block_k

    def _draw(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """The last rows of x, all weights of pairs, and the leaves of the last expert."""
        rng = np.random.default_rng(0)
        shape = (self._rows - self._find_first_row(), self.spec.in_features)
        x = rng.standard_normal(shape, np.float32).astype(DTYPES[_DTYPE])
        factors = rng.uniform(0.5, 1, self._pairs).astype(np.float32)
        leaves = {
            "packed": rng.integers(0, 1 << 16, self.spec.packed_shape, np.uint16),
            "scale": rng.uniform(0.005, 0.02, self.spec.scale_shape).astype(DTYPES[_DTYPE]),
            "zero_point": rng.integers(-8, 8, self.spec.scale_shape, np.int8),
        }
        return x, factors, leaves

    def _decode(self, leaves: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
        """float64 [rows, K], word by word as the layout is defined."""
        k = np.arange(self.spec.in_features)
        tile, rest = np.divmod(k, self.spec.tile_k)
        words = leaves["packed"][rows[:, None] // 64, tile, rows[:, None] % 64, rest % 32]
        codes = (words >> (4 * (rest // 32)).astype(np.uint16) & 15).astype(np.float64)
        group = k // self.spec.group_size
        scale, zero = (leaves[name][group][:, rows].T for name in ("scale", "zero_point"))
        return (codes - 8 - zero.astype(np.float64)) * scale.astype(np.float64)

    def _list_inputs(self) -> list[Part]:
        """The arguments, as far as they are there."""
        x, factors, leaves = self._draw()
        last = self._experts - 1
        experts = np.full(self._count, self._experts, np.int32)
        experts[-1] = last
        pairs = self._mine.astype(np.int32)
        return [
            Part(x, self._find_first_row() * self.spec.in_features * x.itemsize),
            *(Part(leaf, last * leaf.nbytes) for _, leaf in sorted(leaves.items())),
            Part(experts),
            *([] if self.direct else [Part(pairs, (self._count - 1) * pairs.nbytes)]),
            Part(factors),
        ]


def list_last_blocks() -> list[LastBlock]:
    """Few tokens and many, on every GPU."""
    return [
        LastBlock(arch, model, tokens, first)
        for arch in gpu_aot.TARGETS
        for model in MODELS
        for tokens in (64, 2048)
        for first in (True, False)
    ]
