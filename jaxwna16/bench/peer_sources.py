"""What a peer in PyTorch is given: random weights and inputs, and what it must compute from them.

PyTorch comes as an argument, since it may not be installed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxwna16.bench.cases import Case
from jaxwna16.bench.engines import AnyCase
from jaxwna16.bench.moe_cases import MoeCase
from pallas_kernels.format.spec import QuantSpec


class UnservedError(Exception):
    """A case that a peer does not claim to serve, or computes wrongly."""


class Product(NamedTuple):
    """What a peer has made of a source.

    Attributes:
      multiply: takes (inputs, weight) and queues one product.
      weight: a tree of tensors and modules; it is copied, so that copies can take turns.
      prepare: turns inputs of the source into inputs of `multiply`; not timed.
    """

    multiply: Callable[[Any, Any], Any]
    weight: Any
    prepare: Callable[[Any], Any] = lambda inputs: inputs


@dataclasses.dataclass(frozen=True)
class Source:
    """A random weight as PyTorch tensors: W = (codes - zero) * scale.

    Attributes:
      codes: uint8 [N, K].
      scale: [N, G].
      zero: float [N, G], unsigned like the codes: 2^(bits-1) if symmetric.
    """

    torch: Any
    spec: QuantSpec
    codes: Any
    scale: Any
    zero: Any

    def expand(self) -> Any:
        """W as float32."""
        spec = self.spec
        grouped = self.codes.float().view(spec.out_features, spec.groups, spec.group_size)
        weight = (grouped - self.zero.float()[:, :, None]) * self.scale.float()[:, :, None]
        return weight.view(spec.out_features, spec.in_features)

    def draw_inputs(self, case: Case, number: int) -> Any:
        """Random x [M, K]; another one for each number."""
        return _draw_x(self.torch, case, self.spec.in_features, number, self.codes.device)

    def compute(self, x: Any) -> Any:
        """The product in float32."""
        return x.float() @ self.expand().t()


@dataclasses.dataclass(frozen=True)
class ExpertSource:
    """Random weights of experts.

    Attributes:
      experts: of each expert, gate and up, then down.
    """

    torch: Any
    experts: list[tuple[Source, Source]]

    def expand(self, place: int, dtype: Any) -> Any:
        """The stack [E, N, K] of the first or the second weights as floats."""
        sources = [pair[place] for pair in self.experts]
        first = sources[0]
        shape = (len(sources), *first.codes.shape)
        stack = self.torch.empty(shape, dtype=dtype, device=first.codes.device)
        for i, source in enumerate(sources):
            stack[i] = source.expand()
        return stack

    def draw_inputs(self, case: MoeCase, number: int) -> Any:
        """(x, ids, weights); ids and weights are those of our own figures."""
        first = self.experts[0][0]
        device = first.codes.device
        ids, weights = (self.torch.from_numpy(a).to(device) for a in case.draw_choices(number))
        return _draw_x(self.torch, case, first.spec.in_features, number, device), ids, weights

    def compute(self, inputs: Any) -> Any:
        """The sum over the chosen experts in float32."""
        torch = self.torch
        x, ids, weights = inputs
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in ids.unique().tolist():
            tokens, place = (ids == expert).nonzero(as_tuple=True)
            first, second = self.experts[expert]
            h = first.compute(x[tokens])
            gate, up = h.chunk(2, dim=1)
            y = (torch.nn.functional.silu(gate) * up) @ second.expand().t()
            total.index_add_(0, tokens, y * weights[tokens, place, None])
        return total


def draw_source(torch: Any, case: AnyCase, device: str) -> Any:
    """A random `Source` or `ExpertSource`, as the case is. Results are about as large as x."""
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    if isinstance(case, Case):
        return _draw(torch, case.spec, dtype, generator)
    first, second = case.specs
    experts = [
        (_draw(torch, first, dtype, generator), _draw(torch, second, dtype, generator))
        for _ in range(case.experts.experts)
    ]
    return ExpertSource(torch, experts)


def _draw(torch: Any, spec: QuantSpec, dtype: Any, generator: Any) -> Source:
    top, grouped = 1 << spec.bits, (spec.out_features, spec.groups)
    size = 1 / math.sqrt(spec.in_features * (top**2 - 1) / 6)
    place = {"generator": generator, "device": generator.device}

    def draw_integers(shape):
        return torch.randint(0, top, shape, dtype=torch.uint8, **place)

    scale = torch.rand(grouped, **place) * size + size / 2
    zero = torch.full_like(scale, spec.offset) if spec.symmetric else draw_integers(grouped)
    codes = draw_integers((spec.out_features, spec.in_features))
    return Source(torch, spec, codes, scale.to(dtype), zero.to(dtype))


def _draw_x(torch: Any, case: AnyCase, features: int, number: int, device: Any) -> Any:
    generator = torch.Generator(device=device).manual_seed(100 + number)
    shape = (case.tokens, features)
    x = torch.randn(shape, generator=generator, device=device)
    return x.to(getattr(torch, case.dtype))
