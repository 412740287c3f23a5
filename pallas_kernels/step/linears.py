"""Products at the start of an operation: of packed weights, or finished by whoever calls it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.matmul import check_call, quant_matmul_many
from pallas_kernels.xla.dense import matmul

Linear = tuple[Mapping[str, jax.Array], QuantSpec] | jax.Array
"""A leaf dict and its spec, or the product [B, S, N] itself."""
Arrays = list[Any]
"""Of each linear, what changes from call to call: the leaf dict or the product."""


@dataclasses.dataclass(frozen=True)
class Linears:
    """The static facts of some products of one x; a finished one has no spec."""

    specs: tuple[QuantSpec | None, ...]
    backend: str | None = None
    prefer: str = "speed"

    def check(self, x: jax.Array, arrays: Arrays) -> jax.Array:
        """x as an array; raise what `quant_matmul` raises if the arguments are impossible."""
        packed = self._list_packed(arrays)
        return check_call(x, *packed, self.backend, self.prefer) if packed[0] else x

    def multiply(self, x: jax.Array, arrays: Arrays) -> list[jax.Array]:
        """Each product [B, S, N], by the backend that is chosen when it is lowered."""
        packed, options = (
            self._list_packed(arrays),
            {"backend": self.backend, "prefer": self.prefer},
        )
        return self._fill(arrays, quant_matmul_many(x, *packed, **options) if packed[0] else ())

    def multiply_by_xla(self, x: jax.Array, arrays: Arrays) -> list[jax.Array]:
        """The same for one token a row, x [B, 1, K], by XLA."""
        products = [
            matmul(x[:, 0], *pair).astype(x.dtype)[:, None]
            for pair in zip(*self._list_packed(arrays), strict=True)
        ]
        return self._fill(arrays, products)

    def multiply_in_parts(self, x: jax.Array, arrays: Arrays, *, interpret: bool) -> list[Any]:
        """The same as `pallas_kernels.triton.parts.Parts` of [B, N]."""
        # imported here, so that all else works where a later jax has no Pallas-Triton
        from pallas_kernels.triton.parts import Parts
        from pallas_kernels.triton.products import multiply_each

        options = {"prefer": self.prefer, "interpret": interpret}
        products = multiply_each(x[:, 0], *self._list_packed(arrays), **options)
        finished = [
            Parts(y[None, :, 0]) if spec is None else None
            for y, spec in zip(arrays, self.specs, strict=True)
        ]
        return self._fill(finished, products)

    def _list_packed(self, arrays: Arrays) -> tuple[list[Any], list[QuantSpec]]:
        pairs = [(a, s) for a, s in zip(arrays, self.specs, strict=True) if s is not None]
        return [a for a, _ in pairs], [s for _, s in pairs]

    def _fill(self, arrays: Arrays, products: Sequence[Any]) -> list[Any]:
        """The products in the places of the packed weights."""
        left = iter(products)
        return [
            a if spec is None else next(left) for a, spec in zip(arrays, self.specs, strict=True)
        ]


def separate(linears: Sequence[Linear], backend: str | None, prefer: str) -> tuple[Arrays, Linears]:
    """What changes from call to call, and what does not."""
    pairs = [(linear, None) if isinstance(linear, jax.Array) else linear for linear in linears]
    arrays = [a if spec is None else dict(a) for a, spec in pairs]
    return arrays, Linears(tuple(spec for _, spec in pairs), backend, prefer)
