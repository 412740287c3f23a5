"""How the two products of a Mixture-of-Experts are divided among the cores of a GPU.

Rows of a block are as many as an expert gets on average, so that few are padding. Each block reads
the weight of its expert, so reading is the cost while there are few tokens, as in a dense product.
What is different is that every expert has programs of its own: K is split only where so few experts
are chosen that some cores would have nothing to do.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.device import Device
from pallas_kernels.schedule import (
    Tiles,
    add_splits,
    can_take_128,
    choose_tiles,
    count_columns,
    get_fixed,
)
from pallas_kernels.spec import TILE_N, QuantSpec

Specs = tuple[QuantSpec, QuantSpec]
_BLOCKS = (8, 16, 32, 64, 128)
_FILLED = 0.9
_MANY_EXPERTS = 4


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


def choose_moe(
    specs: Specs,
    experts: int,
    tokens: int,
    top_k: int,
    x_dtype,
    scale_dtypes: tuple,
    device: Device,
    *,
    gated: bool = True,
) -> MoeTiles:
    """The tiles of both products: fixed ones, else by rule of thumb.

    Args:
      specs: of the first and the second weight of one expert.
      experts: E.
      tokens: T >= 1.
      top_k: experts of each token.
      x_dtype: bfloat16 or float16.
      scale_dtypes: of the scales of both weights.
      device: the GPU it is for.
      gated: whether the first weight is gate and up.
    """
    fixed = get_fixed(MoeTiles)
    if fixed is not None:
        return fixed
    pairs = tokens * top_k
    direct = tokens == 1 or _MANY_EXPERTS * pairs <= experts
    block_m = 8 if direct else choose_block(pairs, experts)
    if block_m == 128 and not all(can_take_128(x_dtype, s, device) for s in scale_dtypes):
        block_m = 64
    first, second = (
        choose_tiles(spec, block_m, x_dtype, scale_dtype, device)
        for spec, scale_dtype in zip(specs, scale_dtypes, strict=True)
    )
    if block_m > 64:
        return MoeTiles(first=first, second=second)
    chosen = min(pairs, experts)
    columns = count_columns(specs[0], first) // (2 if can_pair_rows(specs[0], gated) else 1)
    # a split first product needs a pass of its own for the activation
    if chosen * columns < device.cores:
        first = add_splits(first, specs[0], device, chosen)
    second = add_splits(second, specs[1], device, chosen)
    return MoeTiles(first=first, second=second, direct=direct)


def choose_block(pairs: int, experts: int) -> int:
    """Rows of a block: the fewest that the average expert does not fill."""
    return next((b for b in _BLOCKS if pairs < _FILLED * experts * b), _BLOCKS[-1])


def can_pair_rows(spec: QuantSpec, gated: bool) -> bool:
    """Whether gate and up both start at a packed tile, so that one program can read both."""
    return gated and spec.out_features % (2 * TILE_N) == 0
