"""The XLA path of a Mixture-of-Experts: expert by expert, in bounded memory.

A loop runs over the blocks of `pallas_kernels.tiles.blocks`. Each step takes the weights of one
expert out of the stacks, expands them and multiplies its tokens. So the floats of at most one
expert exist at a time, and work is proportional to the chosen pairs of token and expert, not to the
number of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formulas.activations import activate
from pallas_kernels.tiles.blocks import find_local, group_pairs

_MOST_ROWS = 256

Product = Callable[[jax.Array, Any], jax.Array]
"""product(x [M, K], leaves of one expert) -> float32 [M, N], without bias."""


def add_experts(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    stacks: tuple[Any, Any],
    products: tuple[Product, Product],
    *,
    experts: int,
    features: int,
    offset: jax.Array | int,
    activation: str,
    gated: bool,
    interleaved: bool,
    weigh: str,
) -> jax.Array:
    """Sum over the chosen experts; float32 [T, H]. A token's experts are added in ascending order.

    Args:
      x: [T, H].
      ids, weights: [T, top_k].
      stacks: trees of the first and the second weights, E in front of each leaf; a leaf named
        "bias" is added to the product.
      products: how to multiply by one expert's first and second weight.
      experts: E.
      features: H of the result.
      offset: the id of the first of them.
      activation, gated, interleaved, weigh: as in `quant_moe`.
    """
    tokens, top_k = ids.shape
    local = find_local(ids.reshape(-1), experts, offset)
    block = choose_rows(ids.size, experts)
    blocks = group_pairs(local, experts, block)
    flat = weights.reshape(-1).astype(jnp.float32)

    @jax.checkpoint
    def run_block(expert: jax.Array, pairs: jax.Array, arguments: Any) -> jax.Array:
        x, flat, stacks = arguments
        first, second = jax.tree.map(lambda leaf: _take(leaf, expert), stacks)
        rows = x.at[lax.div(pairs, jnp.full_like(pairs, top_k))].get(mode="clip")
        factor = flat.at[pairs].get(mode="clip")[:, None]
        h = products[0](rows, first)
        h = _add_bias(h * factor if weigh == "input" else h, first)
        h = activate(h, activation, gated=gated, interleaved=interleaved)
        y = _add_bias(products[1](h.astype(x.dtype), second), second)
        return y * factor if weigh == "output" else y

    def add_block(total: jax.Array, one: Any) -> tuple[jax.Array, None]:
        expert, pairs = one

        def add(total: jax.Array) -> jax.Array:
            y = run_block(expert, pairs, (x, flat, stacks))
            # rows without a pair are the token past the last
            return total.at[lax.div(pairs, jnp.full_like(pairs, top_k))].add(y, mode="drop")

        return lax.cond(expert < experts, add, lambda total: total, total), None

    start = jnp.zeros((tokens, features), jnp.float32)
    total, _ = lax.scan(add_block, start, blocks)
    return total


def choose_rows(pairs: int, experts: int) -> int:
    """Rows of a block: what an expert gets on average, as a power of two.

    Every row costs a product and every block an expansion. With this choice there are at most three
    rows for each pair.
    """
    average = -(-pairs // experts)
    return min(_MOST_ROWS, 1 << (average - 1).bit_length())


def _take(leaf: jax.Array, expert: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(leaf, expert, keepdims=False)


def _add_bias(y: jax.Array, leaves: Any) -> jax.Array:
    return y + leaves["bias"].astype(y.dtype)[None, :] if "bias" in leaves else y
