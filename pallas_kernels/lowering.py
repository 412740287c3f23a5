"""One function for every platform: the backend is chosen when the function is lowered.

So one traced function runs the XLA path on a CPU and lowers to the Triton kernels for a GPU, even
for a GPU that is not there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive, concrete_or_error
from jax.interpreters import mlir

from pallas_kernels.backends import TRITON_DTYPES
from pallas_kernels.errors import BackendError


def choose_at_lowering(
    by_xla: Callable[..., Any],
    by_triton: Callable[..., Any],
    backend: str | None,
    dtype: Any = None,
) -> Callable[..., Any]:
    """Choose the path by `backend` and platform; derivatives are those of `by_xla`.

    Args:
      by_xla: a function of trees of arrays.
      by_triton: the same function, with a keyword `interpret`.
      backend: as in `quant_matmul`.
      dtype: of the activations that tensor cores multiply; None where there are none.
    """
    compiled, interpreted = (functools.partial(by_triton, interpret=i) for i in (False, True))
    if backend == "xla" or dtype not in (None, *TRITON_DTYPES):
        run = by_xla
    elif backend is None:
        run = functools.partial(lax.platform_dependent, cuda=compiled, default=by_xla)
    else:
        run = functools.partial(lax.platform_dependent, cuda=compiled, cpu=interpreted)
    return derive_from(by_xla, run)


def derive_from(plain: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, with the derivatives of `plain`: in both modes, of any order, in any loop.

    A backward pass keeps only the arguments and computes `plain` again. So a packed weight is never
    kept as floats, and a kernel is never differentiated.

    Args:
      plain: a differentiable function of trees of arrays.
      run: the same function, computed in another way.
    """

    @jax.custom_jvp
    def call(*arguments):
        return run(*arguments)

    @functools.partial(call.defjvp, symbolic_zeros=True)
    def push_forward(primals, tangents):
        leaves, tree = jax.tree.flatten(primals)
        slopes = dict(enumerate(jax.tree.leaves(tangents)))
        slopes = {i: slope for i, slope in slopes.items() if not isinstance(slope, SymbolicZero)}

        @jax.checkpoint
        def push(leaves, slopes):
            def move(moving):
                return plain(*tree.unflatten(moving.get(i, leaf) for i, leaf in enumerate(leaves)))

            return jax.jvp(move, [{i: leaves[i] for i in slopes}], [slopes])[1]

        return derived(*primals), push(leaves, slopes)

    def derived(*arguments):
        # The gradient of a `scan` moves loop invariants out of the body. That drops the derivative
        # rule of a call, unless the call is in a checkpoint. Without a trace there is no scan, and
        # a checkpoint would be compiled anew at every call.
        return (call if _is_concrete(arguments) else jax.checkpoint(call))(*arguments)

    return derived


def _is_concrete(arguments: Any) -> bool:
    try:
        for leaf in jax.tree.leaves(arguments):
            concrete_or_error(None, leaf)
    except jax.errors.ConcretizationTypeError:
        return False
    return True


def has_symbolic(shape: tuple[Any, ...]) -> bool:
    """Whether a size is only known when an exported function is called."""
    return any(export.is_symbolic_dim(size) for size in shape)


def refuse_at_lowering(message: str) -> jax.Array:
    """Make a float32 scalar that raises a BackendError if something that needs it is lowered.

    So the branch for one platform may be impossible, as long as nobody lowers it.
    """
    [scalar] = _refuse.bind(message=message)
    return scalar


def _raise(_, *, message: str):
    raise BackendError(message)


_refuse = Primitive("refuse")
_refuse.multiple_results = True
_refuse.def_abstract_eval(lambda *, message: [ShapedArray((), jnp.float32)])
mlir.register_lowering(_refuse, _raise)
