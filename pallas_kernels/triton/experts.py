"""The GPU path of a Mixture-of-Experts: two grouped kernels and what lies between them.

ids -> blocks -> gate and up (activation where it fits) -> down, weighed -> sum over top_k
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.formulas.activations import IN_KERNEL, activate
from pallas_kernels.tiles.blocks import Blocks, find_local, group_pairs
from pallas_kernels.tiles.device import find_device
from pallas_kernels.tiles.expert_rules import can_pair_rows, choose_moe
from pallas_kernels.triton.dense import can_pair
from pallas_kernels.triton.grouped import Epilogue, multiply_blocks
from pallas_kernels.triton.grouping import MOST_PAIRS, group_few_pairs
from pallas_kernels.triton.parts import Parts, add_parts

_FEW_TOKENS = 256
"""Up to this many, results wait for their sum in float32. Above, that is too much memory traffic.
"""


def add_experts(call, rows, offset, stacks, *, interpret: bool) -> jax.Array:
    """Run the experts on rows (x, ids, weights), as `pallas_kernels.moe` does; float32 [T, H]."""
    product, local = multiply_experts(call, rows, offset, stacks, interpret=interpret)
    y = jnp.where((local < call.experts)[:, None], add_parts(product), 0.0)
    return add_parts(Parts(y.reshape(*rows[1].shape, -1).swapaxes(0, 1)))


def multiply_experts(call, rows, offset, stacks, *, interpret: bool) -> tuple[Parts, jax.Array]:
    """The same before the sums: `Parts` of [T * top_k, H], a row for each chosen expert, weighed.

    Also their experts, int32 [T * top_k]; rows of those from E on (not here) are undefined. If
    `offset` is None, all are here: ids are in 0 .. E - 1.
    """
    x, ids, weights = rows
    tokens, top_k = ids.shape
    options, device = call.options, find_device()
    scale_dtypes = tuple(stack["scale"].dtype for stack in stacks)
    specs = (call.spec13, call.spec2)
    tiles = choose_moe(
        specs, call.experts, tokens, top_k, x.dtype, scale_dtypes, device, gated=options.gated
    )
    pairs = ids.reshape(-1)
    local = pairs if offset is None else find_local(pairs, call.experts, offset)
    if tiles.direct:
        blocks = Blocks(local, None)
    elif local.size <= MOST_PAIRS:
        blocks = group_few_pairs(local, call.experts, tiles.first.block_m, interpret=interpret)
    else:
        blocks = group_pairs(local, call.experts, tiles.first.block_m)
    flat = weights.reshape(-1).astype(jnp.float32)
    fused = tiles.first.splits == 1 and options.activation in IN_KERNEL
    paired = (
        fused
        and not options.interleaved
        and can_pair_rows(call.spec13, options.gated)
        and can_pair(call.spec13, tiles.first, scale_dtypes[0], device)
    )
    inside = paired or (fused and not options.gated)
    h = multiply_blocks(
        x,
        stacks[0],
        call.spec13,
        blocks,
        flat,
        tiles.first,
        epilogue=Epilogue(
            options.activation if inside else None,
            paired,
            "sum" if options.weigh == "input" else None,
        ),
        dtype=jnp.float32 if tiles.first.splits > 1 else x.dtype,
        interpret=interpret,
    )
    if not inside:
        h = add_parts(Parts(h if tiles.first.splits > 1 else h[None]))
        h = activate(h, options.activation, gated=options.gated, interleaved=options.interleaved)
    wide = tiles.second.splits > 1 or tokens <= _FEW_TOKENS
    y = multiply_blocks(
        h.astype(x.dtype),
        stacks[1],
        call.spec2,
        blocks,
        flat,
        tiles.second,
        epilogue=Epilogue(weigh="result" if options.weigh == "output" else None),
        dtype=jnp.float32 if wide else x.dtype,
        interpret=interpret,
    )
    return Parts(y if tiles.second.splits > 1 else y[None]), local
