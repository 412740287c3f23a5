"""Which leaves of a parameter tree are trained: `jax.grad` and optimizers take floats only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxwna16.errors import InputError


def split_params(params: Any, wrt: Callable[[str], bool] | None = None) -> tuple[Any, Any]:
    """Split a tree into the trained leaves and the rest; `merge_params` joins them again.

    By default all floats are trained, as `wrt=nnx.Param` does in NNX: norms, biases and embeddings,
    and the scales of packed weights too. Integers never are.

    Args:
      params: a tree of arrays, for instance `checkpoint.params` or Linen's "params".
      wrt: takes the path of a float leaf, as in "model.layers.0.mlp.up_proj.scale", and says
        whether it is trained; None is all of them.

    Returns:
      (trainable, rest), both with the structure of `params`, and None where the other has a leaf.

    Example:
      ```python
      checkpoint = jaxwna16.load_checkpoint("path/to/checkpoint")
      trainable, rest = jaxwna16.split_params(checkpoint.params, wrt=lambda path: "norm" in path)
      count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
      ```
    """

    def is_trained(path, leaf) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return jnp.issubdtype(leaf.dtype, jnp.floating) and (wrt is None or wrt(name))

    trained = jax.tree.map_with_path(is_trained, params)
    trainable = jax.tree.map(lambda leaf, yes: leaf if yes else None, params, trained)
    rest = jax.tree.map(lambda leaf, yes: None if yes else leaf, params, trained)
    return trainable, rest


def merge_params(trainable: Any, rest: Any) -> Any:
    """Join the two trees that `split_params` returned; their leaves may have changed.

    Raises:
      InputError: if the two are not parts of one tree.

    Example:
      ```python
      checkpoint = jaxwna16.load_checkpoint("path/to/checkpoint")
      trainable, rest = jaxwna16.split_params(checkpoint.params)
      halved = jax.tree.map(lambda leaf: leaf / 2, trainable)
      params = jaxwna16.merge_params(halved, rest)
      ```
    """

    def pick(path, ours, theirs):
        if (ours is None) == (theirs is None):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise InputError(f"{name} must be in one of the two trees, found in both or in none")
        return theirs if ours is None else ours

    is_none = lambda leaf: leaf is None  # noqa: E731
    if len({jax.tree.structure(tree, is_leaf=is_none) for tree in (trainable, rest)}) > 1:
        raise InputError(
            "the two trees differ in structure: give both as split_params returned them"
        )
    return jax.tree.map_with_path(pick, trainable, rest, is_leaf=is_none)
