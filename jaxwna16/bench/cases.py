"""One case: a weight, a number of tokens, and what their product must move and compute."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxwna16.bench.shapes import Shape
from pallas_kernels.errors import SpecError
from pallas_kernels.spec import QuantSpec
from pallas_kernels.weights import make_abstract


@dataclasses.dataclass(frozen=True)
class Case:
    """A product x[M, K] @ W.T with W packed.

    Attributes:
      spec: of W.
      tokens: M.
      dtype: of x, of the scales and of the result.
      role: where the shape comes from.
    """

    spec: QuantSpec
    tokens: int
    dtype: str
    role: str = dataclasses.field(default="", compare=False)

    @property
    def label(self) -> str:
        """ "8192x28672 M=16 W4 g128 asymmetric bfloat16"."""
        spec = self.spec
        symmetry = "symmetric" if spec.symmetric else "asymmetric"
        shape = f"{spec.in_features}x{spec.out_features}"
        return f"{shape} M={self.tokens} W{spec.bits} g{spec.group_size} {symmetry} {self.dtype}"

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.tokens * self.spec.in_features * self.spec.out_features

    @property
    def activation_bytes(self) -> int:
        """Bytes of x and of the result."""
        features = self.spec.in_features + self.spec.out_features
        return self.tokens * features * jnp.dtype(self.dtype).itemsize

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed integers, scales and zero points."""
        return count_bytes(make_abstract(self.spec, self.dtype))

    @property
    def float_bytes(self) -> int:
        """Bytes of W in `dtype`, which a plain product reads."""
        itemsize = jnp.dtype(self.dtype).itemsize
        return self.spec.in_features * self.spec.out_features * itemsize

    def describe(self) -> dict[str, Any]:
        """The facts of the case, for a report."""
        spec = self.spec
        return {
            "role": self.role,
            "in_features": spec.in_features,
            "out_features": spec.out_features,
            "tokens": self.tokens,
            "bits": spec.bits,
            "group_size": spec.group_size,
            "symmetric": spec.symmetric,
            "dtype": self.dtype,
            "bytes": self.packed_bytes + self.activation_bytes,
            "float_bytes": self.float_bytes + self.activation_bytes,
            "flops": self.flops,
        }


def count_bytes(tree: Any) -> int:
    """Bytes of all arrays, or descriptions of arrays, in a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def plan_cases(
    shapes: Iterable[Shape],
    tokens: Iterable[int],
    *,
    bits: Iterable[int],
    group_size: int,
    symmetric: Iterable[bool],
    dtype: str,
) -> list[Case]:
    """Every combination, those of one weight together.

    Raises:
      SpecError: if the group size does not divide a K.
    """
    kinds = [(b, s) for b in bits for s in symmetric]
    found = []
    for shape in shapes:
        for width, balanced in kinds:
            try:
                spec = QuantSpec(
                    bits=width,
                    group_size=group_size,
                    symmetric=balanced,
                    in_features=shape.in_features,
                    out_features=shape.out_features,
                )
            except SpecError as error:
                raise SpecError(f"shape {shape.label}: {error}") from error
            found += [Case(spec, m, dtype, shape.role) for m in tokens]
    return found
