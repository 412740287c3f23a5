"""The end of a product in one kernel: splits of K and experts are added, then come the norms.

As XLA fusions these were two or three kernels, which at one token take as long as a product.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.formulas.norms import Norm, Onto, apply_factor, apply_weight
from pallas_kernels.tiles.ahead import choose_ahead
from pallas_kernels.tiles.device import find_device
from pallas_kernels.triton.parts import Parts, load_sum

_ELEMENTS = 8
"""Of a row, for each thread: two vectors of float32."""
_CHUNK = 1 << 14
"""Words that a program without a row reads ahead, 32 KiB."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["local", "shared", "gate"], meta_fields=["held"]
)
@dataclasses.dataclass(frozen=True)
class Experts:
    """What a sum over experts needs beside their results.

    Attributes:
      local: int32 [T * top_k], the expert of each pair; results of those that are not below `held`
        are undefined, and left out.
      held: how many experts are here.
      shared: [T, N], the result of shared experts, or None.
      gate: [T, 1], logits whose sigmoid multiplies `shared`, or None.
    """

    local: jax.Array
    held: int
    shared: jax.Array | None = None
    gate: jax.Array | None = None


def finish_rows(
    product: Parts, onto: Onto, experts: Experts | None = None, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """Add a product to the stream; `pallas_kernels.formulas.norms` has the formula.

    Args:
      product: of [M, N]; of experts [M * top_k, N], the top_k rows of a token after each other,
        which are added in their order.
      onto: with a residual [M, N] in the dtype of the result.
      experts: what else is in the sum, which is rounded once; None for an ordinary product.
      interpret: run as ordinary XLA operations.

    Returns:
      The stream [M, N] and its early norm, or None without one.
    """
    residual = onto.residual
    rows, features = residual.shape
    padded = 1 << (features - 1).bit_length()
    chunks = _divide_ahead(onto.ahead, choose_ahead(find_device()))
    ahead = tuple(words.reshape(-1) for words in onto.ahead[: len(chunks)])
    leaves, tree = jax.tree.flatten((product, dataclasses.replace(onto, ahead=ahead), experts))
    out = [jax.ShapeDtypeStruct(residual.shape, residual.dtype)] * (1 + (onto.early is not None))
    sink = [jax.ShapeDtypeStruct((1,), jnp.int32)] if chunks else []
    run = functools.partial(
        _run_program,
        tree=tree,
        inputs=len(leaves),
        choices=product.sums.shape[1] // rows,
        chunks=chunks,
    )
    warps = min(max(padded // (32 * _ELEMENTS), 1), 16)
    x, *others = pl.pallas_call(
        run,
        out_shape=[*out, *sink],
        grid=(rows + sum(chunks),),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="add_norm",
    )(*leaves)
    return x, None if onto.early is None else others[0]


def _divide_ahead(ahead: Sequence[jax.Array], size: int) -> list[int]:
    """How many chunks of `_CHUNK` words are read of each array, in their order, within `size`."""
    left, chunks = size // (2 * _CHUNK), []
    for words in ahead:
        chunks.append(min(left, words.size // _CHUNK))
        left -= chunks[-1]
    return chunks if any(chunks) else []


def _run_program(*refs: Any, tree: Any, inputs: int, choices: int, chunks: Sequence[int]) -> None:
    """The first programs have a row each, the others a chunk of the words that come next."""
    product, onto, experts = jax.tree.unflatten(tree, refs[:inputs])
    program, first = pl.program_id(0), onto.residual.shape[0]
    finish = functools.partial(_finish_row, program, product, onto, experts, refs[inputs:], choices)
    if not chunks:
        finish()
        return
    pl.when(program < first)(finish)
    for words, count in zip(onto.ahead, chunks, strict=True):
        read = functools.partial(_read_chunk, words, program - first, refs[-1])
        pl.when((program >= first) & (program < first + count))(read)
        first += count


def _read_chunk(words: Any, chunk: jax.Array, sink: Any) -> None:
    """Read words, so that they are in the cache.

    What nobody uses would not be read. So it is used for a sum of non-negative numbers, which the
    compiler does not know to be so.
    """
    places = chunk * _CHUNK + jnp.arange(_CHUNK, dtype=jnp.int32)
    total = jnp.sum(plgpu.load(words.at[places]).astype(jnp.int32))

    @pl.when(total == -1)
    def keep() -> None:
        sink[0] = total


def _finish_row(
    row: jax.Array, product: Any, onto: Any, experts: Any, out_refs: Sequence[Any], choices: int
) -> None:
    features, dtype = onto.residual.shape[1], onto.residual.dtype
    padded = 1 << (features - 1).bit_length()
    columns = jnp.arange(padded, dtype=jnp.int32)
    mask = None if padded == features else columns < features

    def load(ref: Any) -> jax.Array:
        return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=0)

    # all loads come first: none waits for a sum over the row
    residual = load(onto.residual.at[row, columns])
    late, early = (
        None if norm is None else dataclasses.replace(norm, weight=load(norm.weight.at[columns]))
        for norm in (onto.late, onto.early)
    )
    y = _add_choices(product, experts, row, columns, mask, choices)
    if experts is not None and experts.shared is not None:
        shared = load(experts.shared.at[row, columns]).astype(jnp.float32)
        if experts.gate is not None:
            shared = shared * jax.nn.sigmoid(experts.gate[row, 0].astype(jnp.float32))
        y = y + shared
    y = y.astype(dtype)
    y = y if late is None else _normalise(y, late, features)
    x = residual + apply_factor(y, onto.factor)
    plgpu.store(out_refs[0].at[row, columns], x, mask=mask)
    if early is not None:
        plgpu.store(out_refs[1].at[row, columns], _normalise(x, early, features), mask=mask)


def _add_choices(product, experts, row, columns, mask, choices: int) -> jax.Array:
    """The product of a row, float32; of experts the sum of those that were chosen."""
    total = jnp.zeros(columns.shape, jnp.float32)
    for choice in range(choices):
        pair = row * choices + choice
        y = load_sum(product, pair, columns, mask)
        if experts is not None:
            y = jnp.where(experts.local[pair] < experts.held, y, 0.0)
        total = total + y if choice else y
    return total


def _normalise(x: jax.Array, norm: Norm, features: int) -> jax.Array:
    """`apply_norm` of a row whose columns past the last are 0."""
    wide = x.astype(jnp.float32)
    if norm.kind == "centered":
        there = jnp.arange(x.size, dtype=jnp.int32) < features
        wide = jnp.where(there, wide - jnp.sum(wide) / features, 0.0)
    factor = lax.rsqrt(jnp.sum(wide * wide) / features + norm.eps)
    return apply_weight(wide * factor, norm.weight, norm.kind, x.dtype)
