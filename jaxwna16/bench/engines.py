"""The ways to compute a case, and the programs in which each is timed.

*Chained*: one compiled program of many products, one after the other as in a model, each with a
weight of its own. Where N = K a product is the input of the next. Elsewhere an optimization barrier
makes the next wait for it: that costs no kernel, and XLA neither merges products nor moves their
parts past each other. Copies of the weight take turns; two arguments that are the same buffer are
different weights to XLA, so nothing is computed once for both. XLA may replay the kernels as a CUDA
graph, as it does in a model; it is told to keep their order, so that no two products overlap.

*Graph-free*: the same chain without CUDA graphs. A graph launches its kernels faster, but XLA must
change every node when buffers take turns: which of the two the host holds up less depends on the
machine.

*Single*: a program of one product, called again and again without waiting. Here the host's work
for a call counts, where it takes longer than the product. No CUDA graph.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxwna16.bench.cases import Case, count_bytes
from jaxwna16.bench.timing import Clock, Effort, Timing, measure
from pallas_kernels.layout import tiles_from_codes
from pallas_kernels.matmul import quant_matmul
from pallas_kernels.quantize import pad_groups
from pallas_kernels.spec import QuantSpec
from pallas_kernels.weights import make_abstract

Weight = Any
"""A tree of arrays: the leaf dict of a packed weight, or one float array."""

CHAINED, GRAPH_FREE, SINGLE = "chained", "graph_free", "single"
_SAME_INPUTS = 4
_IN_ORDER = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
_NO_GRAPH = {"xla_gpu_enable_command_buffer": ""}
_CUBLAS = {"xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class Engine:
    """A way to compute x @ W.T.

    Attributes:
      name: "ours", "bf16" or "xla".
      packed: whether its weight is packed, or floats.
      backend: of `quant_matmul`, where it is packed.
      options: compiler options beside those of the program.
    """

    name: str
    packed: bool
    backend: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def multiply(self, x: jax.Array, weight: Weight, spec: QuantSpec) -> jax.Array:
        """One product [M, K] -> [M, N]."""
        if self.packed:
            return quant_matmul(x, weight, spec, backend=self.backend)
        contract = (((1,), (1,)), ((), ()))
        return lax.dot_general(x, weight, contract, preferred_element_type=x.dtype)

    def describe_weight(self, case: Case) -> Weight:
        """Shapes and dtypes of one weight."""
        spec = case.spec
        if self.packed:
            return make_abstract(spec, case.dtype)
        return jax.ShapeDtypeStruct((spec.out_features, spec.in_features), case.dtype)


# Among Triton's fusions XLA would search for seconds for each shape: the float product is cuBLAS's.
FLOAT = Engine("bf16", packed=False, options=_CUBLAS)
EXPAND = Engine("xla", packed=True, backend="xla", options=_CUBLAS)


def make_weights(engine: Engine, case: Case, effort: Effort) -> list[Weight]:
    """Copies of a random weight that together exceed the cache, each with numbers of its own."""
    size = count_bytes(engine.describe_weight(case))
    count = min(max(2, math.ceil(effort.cold_bytes / size)), 512)
    draw = _draw_packed if engine.packed else _draw_floats
    make = jax.jit(functools.partial(draw, spec=case.spec, dtype=case.dtype))
    weights = [make(jax.random.key(i)) for i in range(count)]
    return jax.block_until_ready(weights)


def _draw_packed(key: jax.Array, spec: QuantSpec, dtype: str) -> Weight:
    keys = jax.random.split(key, 3)
    grouped = (spec.out_features, spec.groups)
    codes = jax.random.bits(keys[0], (spec.out_features, spec.in_features), jnp.uint8)
    # results are as large as x, so that a chain neither overflows nor dies out
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


def _draw_floats(key: jax.Array, spec: QuantSpec, dtype: str) -> Weight:
    shape = (spec.out_features, spec.in_features)
    numbers = jax.random.normal(key, shape, dtype)
    return numbers * jnp.asarray(1 / math.sqrt(spec.in_features), dtype)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program that is ready to be timed.

    Attributes:
      run: takes the inputs, then the weights, one of each a product.
      products: how many it computes.
    """

    case: Case
    run: Callable[[list[jax.Array], list[Weight]], Any]
    products: int

    def time(self, weights: list[Weight], effort: Effort, *, clock: Clock | None = None) -> Timing:
        """Time it; the weights take turns."""
        case, count = self.case, self.products
        inputs = draw_inputs(case, min(count, _SAME_INPUTS))
        xs = [inputs[i % len(inputs)] for i in range(count)]
        turns = [
            [weights[(start + i) % len(weights)] for i in range(count)]
            for start in range(0, len(weights), count)
        ]
        return measure(
            lambda made: self.run(xs, turns[made % len(turns)]),
            jax.block_until_ready,
            effort,
            products=count,
            **({} if clock is None else {"clock": clock}),
        )


def draw_inputs(case: Case, count: int) -> list[jax.Array]:
    """Random x, [M, K] each."""
    shape = (case.tokens, case.spec.in_features)
    return [jax.random.normal(jax.random.key(100 + i), shape, case.dtype) for i in range(count)]


def count_layers(case: Case, effort: Effort) -> int:
    """How many products a chain has: fewer where they are large."""
    spec, layers = case.spec, effort.layers
    result = case.tokens * spec.out_features * jnp.dtype(case.dtype).itemsize
    while layers > 4 and (
        layers * case.flops > effort.chain_flops or layers * result > effort.chain_bytes
    ):
        layers //= 2
    return layers


def compile_program(
    engine: Engine, case: Case, figure: str, effort: Effort, *, feed: bool = True
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
    spec = case.spec
    # a function of its own for every program: jit never hands out what it traced for another
    multiply = jax.jit(lambda x, weight: engine.multiply(x, weight, spec))

    def run(xs: list[jax.Array], weights: list[Weight]) -> Any:
        y, results = None, []
        for x, weight in zip(xs, weights, strict=True):
            if y is not None and feed and spec.in_features == spec.out_features:
                x = y
            elif y is not None:
                x, y = lax.optimization_barrier((x, y))
                results.append(y)
            y = multiply(x, weight)
        return [*results, y]

    x = jax.ShapeDtypeStruct((case.tokens, spec.in_features), case.dtype)
    arguments = [x] * layers, [engine.describe_weight(case)] * layers
    options = engine.options | (_IN_ORDER if figure == CHAINED else _NO_GRAPH)
    compiled = jax.jit(run).lower(*arguments).compile(compiler_options=options)
    return Program(case, compiled, layers)
