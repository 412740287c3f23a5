"""One case: a weight, a number of tokens, and what their product must move and compute.

`Case` is a linear layer, `jaxwna16.bench.moe_cases.MoeCase` the experts of a Mixture-of-Experts.
Both have the same properties and methods, so that programs, tables and the tuner treat them alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxwna16.bench.shapes import Shape
from pallas_kernels.backends import explain
from pallas_kernels.errors import SpecError
from pallas_kernels.format.layout import tiles_from_codes
from pallas_kernels.format.quantize import pad_groups
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import make_abstract
from pallas_kernels.matmul import quant_matmul
from pallas_kernels.tiles.dense_rules import describe, list_candidates
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.entries import Entry
from pallas_kernels.tiles.tiles import Schedule

Weight = Any
"""A tree of arrays: packed, or floats."""

Inputs = Any
"""A tree of arrays: what a product takes besides the weight."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A product x[M, K] @ W.T with W packed.

    Attributes:
      kind: tells the two kinds of cases apart.
      is_looped: whether XLA computes it in a loop, which takes long.
      longest_chain: products of a chain, at most.
      spec: of W.
      tokens: M.
      dtype: of x, of the scales and of the result.
      role: where the shape comes from.
    """

    kind: ClassVar[str] = "dense"
    is_looped: ClassVar[bool] = False
    longest_chain: ClassVar[int] = 64

    spec: QuantSpec
    tokens: int
    dtype: str
    role: str = dataclasses.field(default="", compare=False)

    @property
    def shape(self) -> str:
        """ "8192x28672": K x N."""
        return f"{self.spec.in_features}x{self.spec.out_features}"

    @property
    def label(self) -> str:
        """ "8192x28672 M=16 W4 g128 asymmetric bfloat16"."""
        spec = self.spec
        symmetry = "symmetric" if spec.symmetric else "asymmetric"
        weight = f"W{spec.bits} g{spec.group_size} {symmetry}"
        return f"{self.shape} M={self.tokens} {weight} {self.dtype}"

    @property
    def weight(self) -> Hashable:
        """Equal for cases that share a weight."""
        return self.spec

    @property
    def float_key(self) -> Hashable:
        """Equal for cases that are the same product without quantization."""
        return (self.shape, self.tokens, self.dtype)

    @property
    def feeds(self) -> bool:
        """Whether a result can be the x of the next product."""
        return self.spec.in_features == self.spec.out_features

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.tokens * self.spec.in_features * self.spec.out_features

    @property
    def result_bytes(self) -> int:
        """Bytes of the result."""
        return self.tokens * self.spec.out_features * jnp.dtype(self.dtype).itemsize

    @property
    def activation_bytes(self) -> int:
        """Bytes of x and of the result."""
        return self.tokens * self.spec.in_features * jnp.dtype(self.dtype).itemsize + (
            self.result_bytes
        )

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed integers, scales and zero points."""
        return count_bytes(self.describe_weight(packed=True))

    @property
    def float_bytes(self) -> int:
        """Bytes of W in `dtype`, which a plain product reads."""
        return count_bytes(self.describe_weight(packed=False))

    def count_least_bytes(self, packed: bool) -> int:
        """Bytes of the weight that a product reads at least, whatever the number of tokens."""
        return self.packed_bytes if packed else self.float_bytes

    def describe(self) -> dict[str, Any]:
        """The facts of the case, for a report."""
        spec = self.spec
        return {
            "shape": self.shape,
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

    # What is computed

    def describe_weight(self, packed: bool) -> Weight:
        """Shapes and dtypes of the weight."""
        spec = self.spec
        if packed:
            return make_abstract(spec, self.dtype)
        return jax.ShapeDtypeStruct((spec.out_features, spec.in_features), self.dtype)

    def draw_weight(self, key: jax.Array, packed: bool) -> Weight:
        """A random weight. Results are about as large as x."""
        return (draw_packed if packed else draw_floats)(key, self.spec, self.dtype)

    def draw_inputs(self, number: int) -> Inputs:
        """Random x [M, K]; another one for each number."""
        shape = (self.tokens, self.spec.in_features)
        return jax.random.normal(jax.random.key(100 + number), shape, self.dtype)

    def compute(
        self, inputs: Inputs, weight: Weight, *, packed: bool, backend: str | None
    ) -> jax.Array:
        """One product [M, K] -> [M, N]."""
        if packed:
            return quant_matmul(inputs, weight, self.spec, backend=backend)
        contract = (((1,), (1,)), ((), ()))
        return lax.dot_general(inputs, weight, contract, preferred_element_type=inputs.dtype)

    # How it is computed

    def name_schedule(self, backend: str | None) -> str:
        """What runs it here: the tiles in words, or the backend's name if it has none.

        Raises:
          Wna16Error: if nothing can run it.
        """
        facts = {"tokens": self.tokens, "scale_dtype": self.dtype}
        choice = explain(self.spec, self.dtype, backend=backend, **facts)
        return choice.schedule or choice.backend

    def list_candidates(self, device: Device) -> Sequence[Schedule]:
        """What the tuner times, the rule's choice first."""
        return list_candidates(self.spec, self.tokens, self.dtype, self.dtype, device)

    def list_more(self, rule: Any, seconds: Sequence[tuple[Any, float]]) -> Sequence[Schedule]:
        """More candidates, chosen by the times of the first ones: none for a linear layer."""
        del rule, seconds
        return []

    def describe_schedule(self, schedule: Any) -> str:
        """In words."""
        return describe(schedule, self.tokens)

    def make_entry(self, schedule: Any) -> Entry:
        """The entry of a table of tiles that stands for this case."""
        return Entry(
            bits=self.spec.bits,
            group_size=self.spec.group_size,
            in_features=self.spec.in_features,
            out_features=self.spec.out_features,
            tokens=self.tokens,
            x_dtype=self.dtype,
            schedule=schedule,
        )


def draw_packed(key: jax.Array, spec: QuantSpec, dtype: str) -> Weight:
    """A random packed weight whose results are as large as x, so that chains neither grow nor die.

    Every code and zero point is equally likely.
    """
    keys = jax.random.split(key, 3)
    grouped = (spec.out_features, spec.groups)
    codes = jax.random.bits(keys[0], (spec.out_features, spec.in_features), jnp.uint8)
    variance = ((1 << spec.bits) ** 2 - 1) / 12 * (1 if spec.symmetric else 2)
    size = 1 / math.sqrt(spec.in_features * variance)
    scale = jax.random.uniform(keys[1], grouped, jnp.float32, 0.5 * size, 1.4 * size)
    weight = {
        "packed": tiles_from_codes(codes & jnp.uint8((1 << spec.bits) - 1), spec),
        "scale": pad_groups(scale.astype(dtype), spec),
    }
    if not spec.symmetric:
        zero = jax.random.randint(keys[2], grouped, -spec.offset, spec.offset, jnp.int32)
        weight["zero_point"] = pad_groups(zero.astype(jnp.int8), spec)
    return weight


def draw_floats(key: jax.Array, spec: QuantSpec, dtype: str) -> jax.Array:
    """A random [N, K] in floats, likewise."""
    shape = (spec.out_features, spec.in_features)
    numbers = jax.random.normal(key, shape, dtype)
    return numbers * jnp.asarray(1 / math.sqrt(spec.in_features), dtype)


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
    """Every combination; cases of one weight follow each other.

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
