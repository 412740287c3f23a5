"""The process that times one peer: python -m jaxwna16.bench.peer_worker, orders on stdin.

Prints lines of `MARK` followed by JSON: {"absent": why}, or {"version": v} and then
{"case": i, "chained": timing, "relative_error": e} or {"case": i, "error": what} for each case.

The products of a peer in PyTorch are queued in one CUDA graph, one after the other, with inputs and
copies of the weight that take turns, as in our own chained program; one in JAX is in that program.
The error is that of one product, relative to its size, against float32; a peer that rounds weights
itself is compared with the float weight it was given, and shows that rounding too. One that is
wrong is not timed.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from jaxwna16.bench import dense_peers, moe_peers
from jaxwna16.bench.cases import Case
from jaxwna16.bench.engines import (
    CHAINED,
    AnyCase,
    compile_program,
    count_copies,
    count_layers,
    make_weights,
)
from jaxwna16.bench.moe_cases import DRAWS, MoeCase
from jaxwna16.bench.moe_peers import RaggedDot
from jaxwna16.bench.peer_sources import Product, UnservedError, draw_source
from jaxwna16.bench.run import describe_failure
from jaxwna16.bench.shapes import MoeShape
from jaxwna16.bench.timing import Effort, measure
from pallas_kernels.format.spec import QuantSpec

MARK = "@peer "

WRONG = 0.3
"""Above the relative error of rounding weights to 4 bits twice, below that of unrelated numbers."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """Where a peer is, and how it is run.

    Attributes:
      module: the module that it needs beside PyTorch.
      package: the package with that module.
      build: makes its product in PyTorch from a source and a dtype.
      engine: of a peer in JAX, instead of `build`.
      packed: whether its weights are packed, or floats.
    """

    module: str
    package: str
    build: Callable[[Any, Any], Product] | None = None
    engine: RaggedDot | None = None
    packed: bool = True

    @property
    def needs(self) -> list[str]:
        """The modules that it imports."""
        return [self.module] if self.engine else ["torch", self.module]


PEERS: dict[str, dict[str, Peer]] = {
    "dense": {
        "torch bf16": Peer("torch", "torch", dense_peers.build_cublas, packed=False),
        "tinygemm": Peer("torch", "torch", dense_peers.build_tinygemm),
        "gemlite": Peer("gemlite", "gemlite", dense_peers.build_gemlite),
        "humming": Peer("humming", "humming-kernels", dense_peers.build_humming),
        "conch": Peer("conch", "conch-triton-kernels", dense_peers.build_conch),
    },
    "moe": {
        "torch grouped": Peer("torch", "torch", moe_peers.build_grouped, packed=False),
        "tokamax": Peer("tokamax", "tokamax", engine=RaggedDot("tokamax", packed=False)),
        "humming": Peer("humming", "humming-kernels", moe_peers.build_humming),
    },
}
"""Kind of cases -> name -> peer."""


def find_missing(peer: Peer) -> str | None:
    """The first module of a peer that is not installed, None if all are; nothing is imported."""
    return next((name for name in peer.needs if not importlib.util.find_spec(name)), None)


def main() -> None:
    """Do what stdin orders."""
    order = json.load(sys.stdin)
    cases = [read_case(order["kind"], facts) for facts in order["cases"]]
    serve(PEERS[order["kind"]][order["peer"]], cases, Effort(**order["effort"]), _say)


def read_case(kind: str, facts: dict[str, Any]) -> AnyCase:
    """A case from the dict that `dataclasses.asdict` makes of it."""
    if kind == "dense":
        return Case(**{**facts, "spec": QuantSpec(**facts["spec"])})
    return MoeCase(**{**facts, "experts": MoeShape(**facts["experts"])})


def _say(message: dict[str, Any]) -> None:
    print(MARK + json.dumps(message), flush=True)


def serve(
    peer: Peer, cases: list[AnyCase], effort: Effort, say: Callable[[dict[str, Any]], None]
) -> None:
    """Time one peer on every case; report a failure and go on with the next case."""
    try:
        modules: list[Any] = [importlib.import_module(module) for module in peer.needs]
        if not peer.engine and not modules[0].cuda.is_available():
            say({"absent": "PyTorch sees no CUDA GPU"})
            return
    except Exception as error:
        say({"absent": describe_failure(error)})
        return
    say({"version": _find_version(peer.package)})
    bench = _EngineBench(peer, effort) if peer.engine else _TorchBench(peer, effort, modules[0])
    for place, case in enumerate(cases):
        try:
            found = bench.time(case)
        except Exception as error:
            found = {"error": describe_failure(error)}
        say({"case": place, **found})


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class _Bench:
    """Times one case after another; the weight is kept for the next."""

    def __init__(self, peer: Peer, effort: Effort):
        self.peer, self.effort = peer, effort
        self._held: tuple[Any, Any] | None = None

    def time(self, case: AnyCase) -> dict[str, Any]:
        """The report on a case."""
        if self._held is None or self._held[0] != case.weight:
            self._held = None  # frees the last weight first
            self._held = case.weight, self.make(case)
        return self.run(case, self._held[1])

    def make(self, case: AnyCase) -> Any:
        raise NotImplementedError

    def run(self, case: AnyCase, made: Any) -> dict[str, Any]:
        raise NotImplementedError


class _TorchBench(_Bench):
    """A peer in PyTorch."""

    def __init__(self, peer: Peer, effort: Effort, torch: Any):
        super().__init__(peer, effort)
        self.torch = torch

    def make(self, case: AnyCase) -> tuple[Any, Product, list[Any]]:
        """The source, the peer's product, and its weights in the number that ours would have."""
        assert self.peer.build is not None
        source = draw_source(self.torch, case, "cuda")
        product = self.peer.build(source, getattr(self.torch, case.dtype))
        copies = count_copies(case, self.peer.packed, self.effort)
        return source, product, [product.weight, *_copy(product.weight, copies - 1)]

    def run(self, case: AnyCase, made: Any) -> dict[str, Any]:
        torch, (source, product, weights) = self.torch, made
        with torch.inference_mode():
            drawn = [source.draw_inputs(case, i) for i in range(DRAWS)]
            inputs = [product.prepare(one) for one in drawn]
            error = check(product.multiply(inputs[0], weights[0]), source.compute(drawn[0]))

            def queue(count: int) -> None:
                for i in range(count):
                    product.multiply(inputs[i % DRAWS], weights[i % len(weights)])

            layers = max(count_layers(case, self.effort), len(weights))
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                queue(3)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                queue(layers)
            timing = measure(
                lambda made: graph.replay(),
                lambda last: torch.cuda.synchronize(),
                self.effort,
                products=layers,
            )
        return {CHAINED: dataclasses.asdict(timing), "layers": layers, "relative_error": error}


class _EngineBench(_Bench):
    """A peer in JAX."""

    def make(self, case: AnyCase) -> list[Any]:
        assert self.peer.engine is not None
        return make_weights(self.peer.engine, case, self.effort)

    def run(self, case: AnyCase, made: Any) -> dict[str, Any]:
        engine = self.peer.engine
        assert engine is not None
        y = engine.compute(case, engine.draw_inputs(case, 0), made[0])
        error = check(y, engine.compute_exactly(case, made[0]))
        program = compile_program(engine, case, CHAINED, self.effort)
        timing = program.time(made, self.effort)
        chained = dataclasses.asdict(timing)
        return {CHAINED: chained, "layers": program.products, "relative_error": error}


def _copy(weight: Any, count: int) -> Iterator[Any]:
    return (copy.deepcopy(weight) for _ in range(count))


def check(y: Any, exact: Any) -> float:
    """The error relative to the exact result, of arrays of PyTorch or JAX.

    Raises:
      UnservedError: if it is no product of these inputs and weight.
    """
    difference = y.astype(jnp.float32) - exact if hasattr(y, "astype") else y.float() - exact
    error = math.sqrt(float((difference**2).sum()) / float((exact**2).sum()))
    if not error < WRONG:
        raise UnservedError(f"wrong: the relative error is {error:.3g}")
    return error


if __name__ == "__main__":
    main()
