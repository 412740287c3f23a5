"""The entries of a table of tuned tiles, and which of them serves a product.

An entry serves products near the shape that was timed: sizes and number of tokens within a factor
of two, and groups of the same class. The nearest entry is used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.expert_tiles import MoeTiles, Specs, find_moe_faults
from pallas_kernels.tiles.tiles import Schedule, Tiles, find_faults

GROUP_CLASSES = (32, 64, 128)
MAX_TOKENS = 4096


def classify_group(group_size: int) -> int:
    """The class of a group size: rounded up to 32, 64 or 128, and 128 for all larger ones.

    To a kernel, only the number of scales in a step along K matters, and a step is hardly longer
    than 128.
    """
    return next((size for size in GROUP_CLASSES if group_size <= size), GROUP_CLASSES[-1])


def round_up_bucket(tokens: int) -> int:
    """The bucket of M: the next power of two, at most 4096."""
    return min(MAX_TOKENS, 1 << max(0, tokens - 1).bit_length())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Timed:
    """The fields of every entry.

    Attributes:
      SIZES: names of the size fields, which must be near.
      bits: 4 or 8.
      group_size: 32, 64 or 128; any other becomes its class, see `classify_group`.
      tokens: M that was timed, as a power of two up to 4096; any other is rounded up.
      x_dtype: "bfloat16" or "float16".
    """

    SIZES: ClassVar[tuple[str, ...]] = ()

    bits: int
    group_size: int
    tokens: int
    x_dtype: str

    def __post_init__(self):
        object.__setattr__(self, "group_size", classify_group(self.group_size))
        object.__setattr__(self, "tokens", round_up_bucket(self.tokens))

    @property
    def kind(self) -> tuple[int, int, str]:
        """The values that must be equal."""
        return (self.bits, self.group_size, self.x_dtype)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The values that must be near."""
        return tuple(getattr(self, name) for name in self.SIZES)

    @property
    def key(self) -> tuple:
        """Everything except the schedule; unique in a table."""
        return (self.bits, self.group_size, *self.sizes, self.tokens, self.x_dtype)

    def _make_spec(self, in_features: int, out_features: int) -> QuantSpec:
        # one group, since the class of the group size need not divide K
        return QuantSpec(
            bits=self.bits,
            group_size=-1,
            symmetric=False,
            in_features=in_features,
            out_features=out_features,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry(_Timed):
    """One tuned shape, and what was fastest for it.

    Attributes:
      in_features, out_features: K and N that were timed.
      schedule: the fastest.
    """

    SIZES: ClassVar[tuple[str, ...]] = ("in_features", "out_features")

    in_features: int
    out_features: int
    schedule: Schedule

    def find_faults(
        self, device: Device, spec: QuantSpec | None = None, scale_dtype: Any = jnp.float32
    ) -> list[str]:
        """Everything that keeps a kernel from running the schedule on weights of `spec`.

        None means weights of the shape that was timed.
        """
        if not isinstance(self.schedule, Tiles):
            return []
        spec = spec or self._make_spec(self.in_features, self.out_features)
        faults = find_faults(self.schedule, spec, device, scale_dtype)
        return faults or _find_idle(self.schedule, spec)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeEntry(_Timed):
    """One tuned shape of gated experts; both weights have the same bits and class of groups.

    Attributes:
      hidden: H.
      intermediate: I; the first weight has N = 2 I.
      experts: E.
      top_k: experts of each token.
      schedule: the fastest.
    """

    SIZES: ClassVar[tuple[str, ...]] = ("hidden", "intermediate", "experts", "top_k")

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    schedule: MoeTiles

    def find_faults(
        self,
        device: Device,
        specs: Specs | None = None,
        scale_dtypes: Sequence = (jnp.float32, jnp.float32),
    ) -> list[str]:
        """Everything that keeps the kernels from running the tiles on weights of `specs`.

        None means weights of the shape that was timed.
        """
        specs = specs or (
            self._make_spec(self.hidden, 2 * self.intermediate),
            self._make_spec(self.intermediate, self.hidden),
        )
        faults = find_moe_faults(self.schedule, specs, device, scale_dtypes)
        if faults:
            return faults
        first, second = self.schedule.first, self.schedule.second
        return [
            *(f"first: {fault}" for fault in _find_idle(first, specs[0])),
            *(f"second: {fault}" for fault in _find_idle(second, specs[1])),
        ]


def _find_idle(tiles: Tiles, spec: QuantSpec) -> list[str]:
    """The fault of more splits than could have work, if it is there."""
    most = 2 * -(-spec.tiles_k * spec.tile_k // tiles.block_k)
    if tiles.splits <= most:
        return []
    return [f"splits must be at most {most}, two for each step of K, found {tiles.splits}"]


@dataclasses.dataclass(frozen=True)
class TileTable:
    """All entries for one kind of GPU.

    Attributes:
      made: with what and when they were made.
      ahead: bytes of the next weights that small kernels bring into the cache, see
        `pallas_kernels.tiles.ahead`.
    """

    device_kind: str
    entries: tuple[Entry, ...]
    made: Mapping[str, str]
    experts: tuple[MoeEntry, ...] = ()
    ahead: int = 0


def find_schedule(
    table: TileTable, device: Device, spec: QuantSpec, tokens: int, x_dtype, scale_dtype
) -> Schedule | None:
    """The schedule of the nearest entry that can run, None if no entry is near.

    Nearest is the least distance in K and N (as logarithms), and among equals the nearest M.
    """
    scales_fit = jnp.dtype(scale_dtype) == jnp.dtype(x_dtype)
    here = (spec.in_features, spec.out_features)
    bucket = round_up_bucket(tokens)

    def serves(entry: Entry) -> bool:
        return (
            _suits(entry.schedule, bucket, entry.tokens)
            and (scales_fit or not _multiplies_weight(entry.schedule))
            and not entry.find_faults(device, spec, scale_dtype)
        )

    return _find_nearest(table.entries, [spec], x_dtype, here, bucket, serves)


def find_moe_schedule(
    table: TileTable,
    device: Device,
    specs: Specs,
    experts: int,
    tokens: int,
    top_k: int,
    x_dtype,
    scale_dtypes: Sequence,
) -> MoeTiles | None:
    """As `find_schedule`, for gated experts."""
    scales_fit = [jnp.dtype(dtype) == jnp.dtype(x_dtype) for dtype in scale_dtypes]
    here = (specs[1].out_features, specs[1].in_features, experts, top_k)
    bucket = round_up_bucket(tokens)

    def takes_scales(tiles: MoeTiles) -> bool:
        parts = zip((tiles.first, tiles.second), scales_fit, strict=True)
        return all(fits or not _multiplies_weight(part) for part, fits in parts)

    def serves(entry: MoeEntry) -> bool:
        return (
            _meets_as_many(entry, bucket * top_k, experts)
            and takes_scales(entry.schedule)
            and not entry.find_faults(device, specs, scale_dtypes)
        )

    return _find_nearest(table.experts, specs, x_dtype, here, bucket, serves)


def _find_nearest(
    entries: Sequence,
    specs: Sequence[QuantSpec],
    x_dtype,
    here: Sequence[int],
    bucket: int,
    serves: Callable[[Any], bool],
) -> Any:
    """The schedule of the nearest entry of the weights' kind that `serves`; None without one."""
    kinds = {_describe_kind(spec, x_dtype) for spec in specs}
    near = [
        entry
        for entry in entries
        if kinds == {entry.kind} and _is_near((*here, bucket), entry) and serves(entry)
    ]

    def rank(entry) -> tuple[float, ...]:
        pairs = zip(here, entry.sizes, strict=True)
        away = sum(abs(math.log2(mine / its)) for mine, its in pairs)
        away_in_tokens = abs(math.log2(bucket / entry.tokens))
        return (away, away_in_tokens, -entry.tokens, *entry.sizes)

    nearest = min(near, key=rank, default=None)
    return nearest and nearest.schedule


def _describe_kind(spec: QuantSpec, x_dtype) -> tuple:
    return spec.bits, classify_group(spec.group_size), jnp.dtype(x_dtype).name


def _is_near(here: Sequence[int], entry: Entry | MoeEntry) -> bool:
    there = (*entry.sizes, entry.tokens)
    return all(max(pair) <= 2 * min(pair) for pair in zip(here, there, strict=True))


def _suits(schedule: Schedule, bucket: int, timed: int) -> bool:
    if not isinstance(schedule, Tiles):
        return bucket >= timed  # the more tokens share the expanded weight, the more it pays
    # each weight must be read as often as when this was timed
    return -(-bucket // schedule.block_m) == -(-timed // schedule.block_m)


def _meets_as_many(entry: MoeEntry, pairs: int, experts: int) -> bool:
    """Whether an expert is read about as often as when the entry was timed."""
    timed = entry.tokens * entry.top_k
    if entry.schedule.direct:  # the more pairs share an expert, the less it pays
        return pairs * entry.experts <= timed * experts
    block = entry.schedule.first.block_m
    return -(-pairs // (experts * block)) == -(-timed // (entry.experts * block))


def _multiplies_weight(schedule: Schedule) -> bool:
    return isinstance(schedule, Tiles) and schedule.scale_on == "weight"
