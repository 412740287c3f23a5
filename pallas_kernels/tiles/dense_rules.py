"""How a product is divided among the cores of a GPU, chosen from its static shape.

Three schedules, by the number of tokens M:

* decode, M <= 64: the fused kernel with one token tile of 8, 16, 32 or 64. Reading the weight is
  the cost, so K is split among programs until every core has some.
* middle, up to about 1000: the fused kernel with token tiles of 64, or of 128 where the scale can
  multiply the weight instead of the sums.
* prefill, above: multiplying is the cost. One kernel expands the weight to the dtype of x, a plain
  product follows; that copy of one weight lives as long as the product.

A table of tuned tiles (`pallas_kernels.tiles.tables`) comes before these rules of thumb.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from pallas_kernels.errors import BackendError
from pallas_kernels.format.spec import SLAB_K, TILE_N, QuantSpec
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.tables import load_schedule
from pallas_kernels.tiles.tiles import PREFILL, Schedule, Tiles, fits

PREFER = ("speed", "memory")
_DECODE_TOKENS = 64
_PREFILL_TOKENS = 1024
_TENSOR_COLUMNS = 512


def check_prefer(prefer: str) -> None:
    """Raise a BackendError unless `prefer` is "speed" or "memory"."""
    if prefer not in PREFER:
        raise BackendError(f"prefer must be one of {PREFER}, got {prefer!r}")


def describe(schedule: Schedule, tokens: int) -> str:
    """The schedule of a product of `tokens` rows, in words."""
    if not isinstance(schedule, Tiles):
        return "prefill: expand the weight, then one product"
    tiles = schedule
    name = "decode" if tokens <= _DECODE_TOKENS else "middle"
    return (
        f"{name}: {tiles.block_m} tokens x {tiles.block_n} features x {tiles.block_k} of K, "
        f"{tiles.splits} split{'s' * (tiles.splits > 1)}, {tiles.warps} warps, "
        f"{tiles.stages} stages, "
        f"scale on the {tiles.scale_on}"
    )


_fixed: contextvars.ContextVar[Any] = contextvars.ContextVar("schedule", default=None)


@contextlib.contextmanager
def fix_schedule(schedule: Any) -> Iterator[None]:
    """Trace every product of the Triton backend inside with `schedule`, for timing and tests.

    A `Schedule` is for dense products, `pallas_kernels.tiles.expert_tiles.MoeTiles` for experts;
    the other kind is chosen as usual. A function that `jax.jit` has traced before keeps its
    schedule.
    """
    token = _fixed.set(schedule)
    try:
        yield
    finally:
        _fixed.reset(token)


def get_fixed(kind: Any) -> Any:
    """The schedule that `fix_schedule` has set, None unless it is of this kind."""
    fixed = _fixed.get()
    return fixed if isinstance(fixed, kind) else None


def choose(
    spec: QuantSpec, tokens: int, x_dtype, scale_dtype, device: Device, prefer: str = "speed"
) -> Schedule:
    """The schedule of one product: a fixed one, else from the device's table, else by rule.

    Args:
      spec: the weight. For several that share x, one whose N is the sum of theirs.
      tokens: M >= 1.
      x_dtype: bfloat16 or float16.
      scale_dtype: of the weight's scales.
      device: the GPU it is for.
      prefer: "memory" never expands a weight.

    Raises:
      TableError: if the device has a table and it cannot be used.
    """
    fixed = get_fixed((Tiles, str))
    if fixed is not None:
        return fixed
    schedule = load_schedule(device, spec, tokens, x_dtype, scale_dtype)
    if schedule is None or (schedule == PREFILL and prefer == "memory"):
        schedule = _choose_by_rule(spec, tokens, x_dtype, scale_dtype, device, prefer)
    return schedule


def _choose_by_rule(spec, tokens, x_dtype, scale_dtype, device, prefer) -> Schedule:
    if tokens >= _PREFILL_TOKENS and prefer == "speed":
        return PREFILL
    if tokens <= _DECODE_TOKENS:
        block_m = round_up_tokens(tokens)
        tiles = _choose_decode(spec, block_m, device, wide=True)
        tiles = fit(tiles, spec, x_dtype, scale_dtype, device)
        return add_splits(tiles, spec, device)
    many = tokens > 2 * _DECODE_TOKENS and can_take_128(x_dtype, scale_dtype, device)
    tiles = _choose_middle(spec, 128 if many else 64)
    return fit(tiles, spec, x_dtype, scale_dtype, device)


def can_take_128(x_dtype, scale_dtype, device: Device) -> bool:
    """Whether tiles of 128 tokens are worth it: elsewhere their sums do not fit into registers."""
    return jnp.dtype(scale_dtype) == jnp.dtype(x_dtype) and device.is_hopper


def choose_tiles(spec: QuantSpec, block_m: int, x_dtype, scale_dtype, device: Device) -> Tiles:
    """Tiles without splits for `block_m` tokens of each program, by rule of thumb."""
    if block_m <= _DECODE_TOKENS:
        tiles = _choose_decode(spec, block_m, device, wide=False)
    else:
        tiles = _choose_middle(spec, block_m)
    return fit(tiles, spec, x_dtype, scale_dtype, device)


def _choose_middle(spec: QuantSpec, block_m: int) -> Tiles:
    scale_on = "weight" if block_m == 128 else "sum"
    return Tiles(block_m=block_m, block_n=128, block_k=spec.tile_k, scale_on=scale_on)


def fit(tiles: Tiles, spec: QuantSpec, x_dtype, scale_dtype, device: Device) -> Tiles:
    """`tiles`, changed where they would not fit into registers or shared memory."""
    if _has_many_sums(spec, tiles, device):
        if jnp.dtype(scale_dtype) == jnp.dtype(x_dtype):
            tiles = dataclasses.replace(tiles, scale_on="weight")
        elif tiles.block_m == 64:
            tiles = dataclasses.replace(tiles, warps=8)
    smaller = [
        *(dataclasses.replace(tiles, stages=stages) for stages in range(tiles.stages, 1, -1)),
        dataclasses.replace(tiles, stages=2, block_n=TILE_N, warps=2),
        dataclasses.replace(tiles, stages=1),
    ]
    return next((t for t in smaller if fits(t, spec, scale_dtype, device)), smaller[-1])


def _has_many_sums(spec: QuantSpec, tiles: Tiles, device: Device) -> bool:
    """Whether the sums for each group and token did not fit into registers, in machine code."""
    few_tokens = tiles.block_m < (64 if device.is_hopper else 32)
    return spec.groups > 1 and spec.group_size < 128 and not few_tokens


def round_up_tokens(tokens: int) -> int:
    """The least power of two that holds `tokens`, at least 8."""
    return max(8, 1 << (tokens - 1).bit_length())


def _choose_decode(spec: QuantSpec, block_m: int, device: Device, *, wide: bool) -> Tiles:
    # Two packed tiles in one step where that leaves no half step and the sums of their groups fit
    # into registers: less work besides the weights.
    least = 64 if spec.bits == 4 or device.is_blackwell else 32
    few = spec.groups == 1 or spec.group_size >= least
    small = block_m <= 16 or (spec.bits == 8 and (block_m <= 32 or device.is_hopper))
    pair = spec.tiles_k % 2 == 0 and few and small and not spec.is_mixed
    # Wide where reading x is the cost: each program reads all of its K again.
    large = device.is_hopper and spec.bits == 4 and block_m in (16, 32) and spec.tiles_n >= 64
    wide = wide and large
    # With fewer stages the assembler was seen to spill, or to spend more instructions.
    deep = device.is_hopper and spec.bits == 4 and block_m == 8 and pair
    if spec.is_mixed and device.is_blackwell and block_m <= 16:
        # seen to take two fifths of the instructions of 128 features
        return Tiles(block_m=block_m, block_n=TILE_N, block_k=spec.tile_k, warps=2)
    return Tiles(
        block_m=block_m,
        block_n=256 if wide else 128,
        block_k=spec.tile_k * (2 if pair else 1),
        warps=8 if wide else 2 if spec.bits == 8 and block_m == 8 else 4,
        stages=5 if deep else 3,
    )


def add_splits(tiles: Tiles, spec: QuantSpec, device: Device, copies: int = 1) -> Tiles:
    """`tiles` with K split until there is enough to do; `copies` products run at once."""
    return dataclasses.replace(tiles, splits=_choose_splits(spec, tiles, device, copies))


def count_columns(spec: QuantSpec, tiles: Tiles) -> int:
    """How many tiles of features there are."""
    return -(-spec.tiles_n * TILE_N // tiles.block_n)


def _choose_splits(spec: QuantSpec, tiles: Tiles, device: Device, copies: int = 1) -> int:
    """Enough programs to fill each core, while each has two steps and its sums are few."""
    programs = count_programs(tiles, spec, device) * device.cores
    wanted = -(-programs // (copies * count_columns(spec, tiles)))
    # A feature's sums are written and read, 8 bytes a token and split (mostly in the L2 cache), and
    # should be no more than its weight, K bits / 8.
    affordable = spec.in_features * spec.bits // (8 * 8 * tiles.block_m)
    splits = max(1, min(wanted, affordable, _count_steps(spec, tiles) // 2))
    return _even_out(spec, tiles, splits)


def count_programs(tiles: Tiles, spec: QuantSpec, device: Device) -> int:
    """How many programs a core gets: two, or one if a single one fills the tensor memory.

    As the compiler was seen to lay it out, each slab of a step has columns of its own, for its sums
    and for half as many weights as there are features. Slabs share columns if the sums of groups
    are kept apart.
    """
    is_apart = spec.groups > 1 and not spec.is_mixed and tiles.scale_on == "sum"
    slabs = 1 if is_apart else tiles.block_k // SLAB_K
    columns = slabs * (tiles.block_m + SLAB_K // 2)
    return 1 if device.is_blackwell and 2 * columns > _TENSOR_COLUMNS else 2


def _count_steps(spec: QuantSpec, tiles: Tiles) -> int:
    return -(-spec.tiles_k * spec.tile_k // tiles.block_k)


def _even_out(spec: QuantSpec, tiles: Tiles, splits: int) -> int:
    """At most `splits`, none of them empty; all but perhaps the last take equally many steps."""
    steps = _count_steps(spec, tiles)
    return -(-steps // -(-steps // splits))


def list_candidates(
    spec: QuantSpec, tokens: int, x_dtype, scale_dtype, device: Device
) -> list[Schedule]:
    """The schedules worth timing, the rule's choice first, each once."""
    rule = _choose_by_rule(spec, tokens, x_dtype, scale_dtype, device, "speed")
    if tokens > _DECODE_TOKENS:
        others = [PREFILL, *_list_middle(spec, x_dtype, scale_dtype, device)]
    else:
        block_m = round_up_tokens(tokens)
        others = list(_list_decode(spec, block_m, x_dtype, scale_dtype, device))
    fitting = [
        other
        for other in others
        if not isinstance(other, Tiles) or fits(other, spec, scale_dtype, device)
    ]
    return list(dict.fromkeys([rule, *fitting]))


def _list_middle(spec: QuantSpec, x_dtype, scale_dtype, device: Device) -> Iterator[Tiles]:
    can_scale_weight = jnp.dtype(scale_dtype) == jnp.dtype(x_dtype)
    for scale_on in ("sum", "weight") if can_scale_weight else ("sum",):
        for block_m in (64, 128):
            for block_n, warps in ((128, 4), (128, 8), (256, 8)):
                for stages in (3, 4):
                    if block_m == 128 and (scale_on == "sum" or not device.is_hopper):
                        continue  # the sums do not fit into registers
                    yield Tiles(
                        block_m=block_m,
                        block_n=block_n,
                        block_k=spec.tile_k,
                        warps=warps,
                        stages=stages,
                        scale_on=scale_on,
                    )


def _list_decode(
    spec: QuantSpec, block_m: int, x_dtype, scale_dtype, device: Device
) -> Iterator[Tiles]:
    on_weight = block_m == 64 and jnp.dtype(scale_dtype) == jnp.dtype(x_dtype)
    for scale_on, (block_n, warps), per_step, stages in itertools.product(
        ("sum", "weight") if on_weight else ("sum",),
        ((64, 2), (64, 4), (128, 2), (128, 4), (256, 4), (256, 8)),
        (1, 2, 4) if spec.bits == 8 else (1, 2),
        (3, 4),
    ):
        # the sums of a thread; those of one group need as many registers again
        many = block_m * block_n > 32 * warps * (64 if scale_on == "sum" else 128)
        long = per_step > 1 and block_m * per_step > 32
        if many or long or block_n > spec.tiles_n * TILE_N or spec.tiles_k % per_step:
            continue
        tiles = Tiles(
            block_m=block_m,
            block_n=block_n,
            block_k=spec.tile_k * per_step,
            warps=warps,
            stages=stages,
            scale_on=scale_on,
        )
        if on_weight and scale_on == "sum" and _has_many_sums(spec, tiles, device):
            continue
        rule = _choose_splits(spec, tiles, device)
        for splits in (max(1, rule // 2), rule, 2 * rule):
            if splits <= _count_steps(spec, tiles):
                yield dataclasses.replace(tiles, splits=_even_out(spec, tiles, splits))
