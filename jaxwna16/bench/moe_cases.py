"""Cases of a Mixture-of-Experts: both products, from x to the sum over the chosen experts.

Each token chooses `top_k` different experts at random, from a fixed seed. Peers use the same draws.
Only the weights of experts that some token has chosen must be read, so bytes are counted for
exactly those.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxwna16.bench.cases import Inputs, Weight, count_bytes, draw_floats, draw_packed
from jaxwna16.bench.shapes import MoeShape
from pallas_kernels.backends import explain
from pallas_kernels.errors import SpecError
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import make_abstract
from pallas_kernels.moe import float_moe, quant_moe
from pallas_kernels.tiles.blocks import Blocks, find_local, group_pairs
from pallas_kernels.tiles.device import Device, find_device
from pallas_kernels.tiles.entries import MoeEntry
from pallas_kernels.tiles.expert_rules import choose_moe, combine, describe_moe, list_moe_candidates
from pallas_kernels.tiles.expert_tiles import MoeTiles
from pallas_kernels.xla.experts import choose_rows

DRAWS = 4
"""How many different inputs take turns; what is counted is the mean over them."""

_SEED = 20_261_121


@dataclasses.dataclass(frozen=True)
class MoeCase:
    """sum_k weight_k * down(silu(gate(x)) * up(x)), with the weights of all experts packed.

    Attributes:
      kind, is_looped, longest_chain, feeds: as in `Case`.
      experts: their shape.
      bits: of the packed integers.
      group_size: input features that share a scale; -1 is one group.
      symmetric: whether there are no zero points.
      tokens: T.
      dtype: of x, of the scales and of the result.
    """

    kind: ClassVar[str] = "moe"
    is_looped: ClassVar[bool] = True
    longest_chain: ClassVar[int] = 16  # each product is several kernels, which take long to compile
    feeds: ClassVar[bool] = False  # the product of gate and up would grow without end, or die out

    experts: MoeShape
    bits: int
    group_size: int
    symmetric: bool
    tokens: int
    dtype: str

    def __post_init__(self):
        _ = self.specs  # which say what is wrong

    @functools.cached_property
    def specs(self) -> tuple[QuantSpec, QuantSpec]:
        """Of gate and up, and of down, of one expert."""
        hidden, middle = self.experts.hidden, self.experts.intermediate
        first, second = (
            QuantSpec(
                bits=self.bits,
                group_size=self.group_size,
                symmetric=self.symmetric,
                in_features=k,
                out_features=n,
            )
            for k, n in ((hidden, 2 * middle), (middle, hidden))
        )
        return first, second

    @property
    def role(self) -> str:
        """Where the shape comes from."""
        return self.experts.role

    @property
    def shape(self) -> str:
        """ "2048x768 E128 k8"."""
        return self.experts.label

    @property
    def label(self) -> str:
        """ "2048x768 E128 k8 T=16 W4 g128 asymmetric bfloat16"."""
        symmetry = "symmetric" if self.symmetric else "asymmetric"
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        weight = f"W{self.bits} {group} {symmetry}"
        return f"{self.shape} T={self.tokens} {weight} {self.dtype}"

    @property
    def weight(self) -> Hashable:
        """Equal for cases that share a weight."""
        return (self.experts, self.bits, self.group_size, self.symmetric)

    @property
    def float_key(self) -> Hashable:
        """Equal for cases that are the same without quantization."""
        return (self.experts, self.tokens, self.dtype)

    @functools.cached_property
    def experts_touched(self) -> float:
        """How many experts are chosen by some token; the mean over the draws."""
        return float(np.mean([np.unique(self.draw_choices(i)[0]).size for i in range(DRAWS)]))

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        sizes = sum(spec.in_features * spec.out_features for spec in self.specs)
        return 2 * self.tokens * self.experts.top_k * sizes

    @property
    def result_bytes(self) -> int:
        """Bytes of the result."""
        return self.tokens * self.experts.hidden * jnp.dtype(self.dtype).itemsize

    @property
    def activation_bytes(self) -> int:
        """Bytes of x, ids, routing weights and the result.

        Values between the products are not counted: they need not be in memory.
        """
        return 2 * self.result_bytes + 8 * self.tokens * self.experts.top_k

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed integers, scales and zero points of the experts touched."""
        return round(self.experts_touched * self._count_expert_bytes(packed=True))

    @property
    def float_bytes(self) -> int:
        """Bytes of the experts touched in `dtype`."""
        return round(self.experts_touched * self._count_expert_bytes(packed=False))

    def count_least_bytes(self, packed: bool) -> int:
        """Bytes of the weights that one token reads."""
        return self.experts.top_k * self._count_expert_bytes(packed)

    def _count_expert_bytes(self, packed: bool) -> int:
        return count_bytes(self.describe_weight(packed)) // self.experts.experts

    def describe(self) -> dict[str, Any]:
        """The facts of the case, for a report."""
        shape = dataclasses.asdict(self.experts)
        return {
            "shape": self.shape,
            "role": shape.pop("role"),
            **shape,
            "experts_touched": self.experts_touched,
            "tokens": self.tokens,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "dtype": self.dtype,
            "bytes": self.packed_bytes + self.activation_bytes,
            "float_bytes": self.float_bytes + self.activation_bytes,
            "flops": self.flops,
        }

    # What is computed

    def describe_weight(self, packed: bool) -> Weight:
        """Shapes and dtypes of the stacked weights of both products."""
        count = self.experts.experts
        if packed:
            return tuple(make_abstract(spec, self.dtype, experts=count) for spec in self.specs)
        return tuple(
            jax.ShapeDtypeStruct((count, spec.out_features, spec.in_features), self.dtype)
            for spec in self.specs
        )

    def draw_weight(self, key: jax.Array, packed: bool) -> Weight:
        """Random weights, one expert after the other to spare memory."""
        draw = draw_packed if packed else draw_floats

        def draw_expert(key: jax.Array) -> Weight:
            keys = jax.random.split(key)
            return tuple(draw(keys[i], spec, self.dtype) for i, spec in enumerate(self.specs))

        return lax.map(draw_expert, jax.random.split(key, self.experts.experts))

    def draw_choices(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [T, top_k] without repetition, and weights float32 that add up to 1."""
        random = np.random.default_rng((_SEED, number))
        order = random.random((self.tokens, self.experts.experts)).argsort(axis=1)
        weights = 0.1 + random.random((self.tokens, self.experts.top_k))
        ids = order[:, : self.experts.top_k].astype(np.int32)
        return ids, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)

    def draw_inputs(self, number: int) -> Inputs:
        """(x, ids, weights); others for each number."""
        shape = (self.tokens, self.experts.hidden)
        x = jax.random.normal(jax.random.key(100 + number), shape, self.dtype)
        return (x, *(jnp.asarray(choice) for choice in self.draw_choices(number)))

    def compute(
        self, inputs: Inputs, weight: Weight, *, packed: bool, backend: str | None
    ) -> jax.Array:
        """Both products of the chosen experts, and the sum over them."""
        if packed:
            spec13, spec2 = self.specs
            return quant_moe(*inputs, *weight, spec13=spec13, spec2=spec2, backend=backend)
        return float_moe(*inputs, *weight)

    def group(self, inputs: Inputs, backend: str | None) -> Blocks:
        """What comes before the products: which token meets which expert."""
        total, experts = self.tokens * self.experts.top_k, self.experts.experts
        local = find_local(inputs[1].reshape(-1), experts, 0)
        if backend == "xla":
            return group_pairs(local, experts, choose_rows(total, experts))
        block = self.choose_tiles(find_device()).first.block_m

        def group_on_gpu(local: jax.Array) -> Blocks:
            # imported here, so that all else works where a later jax has no Pallas-Triton
            from pallas_kernels.triton.grouping import MOST_PAIRS, group_few_pairs

            group = group_few_pairs if total <= MOST_PAIRS else group_pairs
            return group(local, experts, block)

        def group_elsewhere(local: jax.Array) -> Blocks:
            return group_pairs(local, experts, block)

        return lax.platform_dependent(local, cuda=group_on_gpu, default=group_elsewhere)

    def is_grouped(self, backend: str | None) -> bool:
        """Whether pairs are grouped at all."""
        return backend == "xla" or not self.choose_tiles(find_device()).direct

    # How it is computed

    @property
    def _facts(self) -> dict[str, Any]:
        return {
            "specs": self.specs,
            "experts": self.experts.experts,
            "tokens": self.tokens,
            "top_k": self.experts.top_k,
            "x_dtype": self.dtype,
            "scale_dtypes": (self.dtype, self.dtype),
        }

    def choose_tiles(self, device: Device) -> MoeTiles:
        """The tiles of the grouped kernels."""
        return choose_moe(**self._facts, device=device)

    def name_schedule(self, backend: str | None) -> str:
        """As `Case.name_schedule`."""
        choice = explain(self.specs[0], self.dtype, backend=backend)
        if choice.backend == "xla":
            return choice.backend
        return describe_moe(self.choose_tiles(find_device()))

    def list_candidates(self, device: Device) -> Sequence[MoeTiles]:
        """What the tuner times, the rule's choice first."""
        return list_moe_candidates(**self._facts, device=device)

    def list_more(self, rule: Any, seconds: Sequence[tuple[Any, float]]) -> Sequence[MoeTiles]:
        """More candidates, chosen by the times of the first ones: the best of both products."""
        return combine(rule, seconds)

    def describe_schedule(self, schedule: Any) -> str:
        """In words."""
        return describe_moe(schedule)

    def make_entry(self, schedule: Any) -> MoeEntry:
        """The entry of a table of tiles that stands for this case."""
        shape = dataclasses.asdict(self.experts)
        del shape["role"]
        return MoeEntry(
            bits=self.bits,
            group_size=max(spec.group_size for spec in self.specs),
            **shape,
            tokens=self.tokens,
            x_dtype=self.dtype,
            schedule=schedule,
        )


def plan_moe_cases(
    shapes: Iterable[MoeShape],
    tokens: Iterable[int],
    *,
    bits: Iterable[int],
    group_size: int,
    symmetric: Iterable[bool],
    dtype: str,
) -> list[MoeCase]:
    """Every combination; cases of one weight follow each other.

    Raises:
      SpecError: if the group size does not divide H or I.
    """
    kinds = [(b, s) for b in bits for s in symmetric]
    found = []
    for shape in shapes:
        try:
            found += [
                MoeCase(shape, width, group_size, balanced, count, dtype)
                for width, balanced in kinds
                for count in tokens
            ]
        except SpecError as error:
            raise SpecError(f"experts {shape.label}: {error}") from error
    return found
