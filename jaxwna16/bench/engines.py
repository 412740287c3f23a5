"""The ways to compute a case, and the programs in which each is timed.

*Chained*: one compiled program of many products, one after the other as in a model, each with a
weight of its own. Where N = K a product is the input of the next. Elsewhere, and for experts, an
optimization barrier makes the next wait for it: that costs no kernel, and XLA neither merges
products nor moves their parts past each other. Copies of the weight take turns; two arguments that
are the same buffer are different weights to XLA, so nothing is computed once for both. XLA may
replay the kernels as a CUDA graph, as it does in a model; it is told to keep their order, so that
no two products overlap.

*Graph-free*: the same chain without CUDA graphs. A graph launches its kernels faster, but XLA must
change every node when buffers take turns. Which of the two waits less for the host depends on the
machine.

*Single*: a program of one product, called again and again without waiting, without a CUDA graph.
Here the host's work for a call counts, if it takes longer than the product.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jaxwna16.bench.cases import Case, Inputs, Weight, count_bytes
from jaxwna16.bench.moe_cases import DRAWS, MoeCase
from jaxwna16.bench.timing import Clock, Effort, Timing, measure

AnyCase = Case | MoeCase

CHAINED, GRAPH_FREE, SINGLE = "chained", "graph_free", "single"
_MOST_COPIES = 512
_IN_ORDER = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
_NO_GRAPH = {"xla_gpu_enable_command_buffer": ""}
_CUBLAS = {"xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class Engine:
    """A way to compute a case.

    Attributes:
      name: "ours", "bf16" or "xla".
      packed: whether its weight is packed, or floats.
      backend: of `quant_matmul` or `quant_moe`, where it is packed.
      options: compiler options beside those of the program.
    """

    name: str
    packed: bool
    backend: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def compute(self, case: AnyCase, inputs: Inputs, weight: Weight) -> Any:
        """One product."""
        return case.compute(inputs, weight, packed=self.packed, backend=self.backend)

    def describe_weight(self, case: AnyCase) -> Weight:
        """Shapes and dtypes of one weight."""
        return case.describe_weight(self.packed)

    def draw_weight(self, case: AnyCase, key: jax.Array) -> Weight:
        """A random weight."""
        return case.draw_weight(key, self.packed)

    def draw_inputs(self, case: AnyCase, number: int) -> Inputs:
        """Random inputs; others for each number."""
        return case.draw_inputs(number)


class Grouping(Engine):
    """A part of a Mixture-of-Experts: which token meets which expert. It reads no weight."""

    def compute(self, case: AnyCase, inputs: Inputs, weight: Weight) -> Any:
        assert isinstance(case, MoeCase)
        return case.group(inputs, self.backend)


# cuBLAS computes float products: XLA would search its Triton fusions for seconds for each shape.
FLOAT = Engine("bf16", packed=False, options=_CUBLAS)
EXPAND = Engine("xla", packed=True, backend="xla", options=_CUBLAS)


def make_weights(engine: Engine, case: AnyCase, effort: Effort) -> list[Weight]:
    """Copies of a random weight, each with numbers of its own, that take turns."""
    make = jax.jit(functools.partial(engine.draw_weight, case))
    copies = count_copies(case, engine.packed, effort)
    return jax.block_until_ready([make(jax.random.key(i)) for i in range(copies)])


def count_copies(case: AnyCase, packed: bool, effort: Effort) -> int:
    """How many: one turn reads more than the cache holds, within `effort.most_bytes`."""
    wanted = max(2, math.ceil(effort.cold_bytes / case.count_least_bytes(packed)))
    size = count_bytes(case.describe_weight(packed))
    return min(wanted, _MOST_COPIES, max(1, effort.most_bytes // size))


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program that is ready to be timed.

    Attributes:
      engine, case: what it computes.
      run: takes the inputs, then the weights: one of each for every product.
      products: how many it computes.
    """

    engine: Engine
    case: AnyCase
    run: Callable[[list[Inputs], list[Weight]], Any]
    products: int

    def time(self, weights: list[Weight], effort: Effort, *, clock: Clock | None = None) -> Timing:
        """Time it; inputs and weights take turns."""
        count = self.products
        inputs = [self.engine.draw_inputs(self.case, i) for i in range(DRAWS)]
        turns = [
            (
                [inputs[(start + i) % DRAWS] for i in range(count)],
                [weights[(start + i) % len(weights)] for i in range(count)],
            )
            for start in range(0, max(len(weights), DRAWS), count)
        ]
        return measure(
            lambda made: self.run(*turns[made % len(turns)]),
            jax.block_until_ready,
            effort,
            products=count,
            **({} if clock is None else {"clock": clock}),
        )


def count_layers(case: AnyCase, effort: Effort) -> int:
    """How many products a chain has: fewer where they are large."""
    layers = min(effort.layers, case.longest_chain)
    while layers > 4 and (
        layers * case.flops > effort.chain_flops or layers * case.result_bytes > effort.chain_bytes
    ):
        layers //= 2
    return layers


def compile_program(
    engine: Engine, case: AnyCase, figure: str, effort: Effort, *, feed: bool = True
) -> Program:
    """Compile one of the programs of an engine.

    Args:
      engine, case, effort: what is computed, and how much of it.
      figure: `CHAINED`, `GRAPH_FREE` or `SINGLE`.
      feed: whether a product may be the input of the next; if not, the program returns the product
        of each input with its weight.

    Raises:
      Exception: whatever tracing or the compiler raises.
    """
    layers = 1 if figure == SINGLE else count_layers(case, effort)
    # a function of its own for every program: jit never hands out what it traced for another
    compute = jax.jit(lambda inputs, weight: engine.compute(case, inputs, weight))

    def run(xs: list[Inputs], weights: list[Weight]) -> Any:
        y, results = None, []
        for inputs, weight in zip(xs, weights, strict=True):
            if y is not None and feed and case.feeds:
                inputs = y
            elif y is not None:
                inputs, y = lax.optimization_barrier((inputs, y))
                results.append(y)
            y = compute(inputs, weight)
        return [*results, y]

    inputs = jax.eval_shape(lambda: engine.draw_inputs(case, 0))
    arguments = [inputs] * layers, [engine.describe_weight(case)] * layers
    options = engine.options | (_IN_ORDER if figure == CHAINED else _NO_GRAPH)
    compiled = jax.jit(run).lower(*arguments).compile(compiler_options=options)
    return Program(engine, case, compiled, layers)
