"""The process that times one peer: python -m jaxwna16.bench.peer_worker, orders on stdin.

Prints lines that begin with `MARK` and go on in JSON: {"absent": why}, or {"version": v} and then
{"case": i, "chained": timing, "relative_error": e} or {"case": i, "error": what} for each case.

A peer's products are queued in one CUDA graph, one after the other, with copies of the weight that
take turns, as in our own chained program. The error is that of one product, relative to its size,
against float32 products with the weight expanded in PyTorch; a peer that rounds weights itself is
compared with the float weight it was given, and shows that rounding too.
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
from collections.abc import Callable
from typing import Any

from jaxwna16.bench.cases import Case
from jaxwna16.bench.engines import CHAINED, count_layers
from jaxwna16.bench.run import describe_failure
from jaxwna16.bench.timing import Effort, measure
from pallas_kernels.spec import QuantSpec

MARK = "@peer "


class UnservedError(Exception):
    """A case that a peer does not claim to serve."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A random weight as PyTorch tensors on the GPU: W = (codes - zero) * scale.

    Attributes:
      codes: uint8 [N, K].
      scale: [N, G].
      zero: float [N, G]; without a sign, so 2^(bits-1) where it is symmetric.
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


Builder = Callable[[Source, Any], tuple[Callable[[Any, Any], Any], Any]]
"""Takes the source and the torch dtype; returns multiply(x, weight) and the weight."""


def build_cublas(source: Source, dtype: Any):
    """The plain product in 16-bit floats."""
    return source.torch.nn.functional.linear, source.expand().to(dtype)


def build_tinygemm(source: Source, dtype: Any):
    """PyTorch's own 4-bit kernel: bfloat16, W = (q - 8) * scale + zero."""
    torch, spec = source.torch, source.spec
    if spec.bits != 4 or dtype != torch.bfloat16 or spec.group_size not in (32, 64, 128, 256):
        raise UnservedError("4 bits, bfloat16 and groups of 32 to 256 only")
    pairs = (source.codes[:, ::2] << 4) | source.codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    scale = source.scale.float()
    both = torch.stack([scale, (8 - source.zero.float()) * scale], dim=2)
    both = both.transpose(0, 1).contiguous().to(dtype)

    def multiply(x, weight):
        return torch.ops.aten._weight_int4pack_mm(x, weight[0], spec.group_size, weight[1])

    return multiply, (packed, both)


def build_gemlite(source: Source, dtype: Any):
    """GemLite's Triton kernels, with its default tuning."""
    helper: Any = importlib.import_module("gemlite.helper")
    makers = {4: helper.A16W4_HQQ_INT, 8: helper.A16W8_HQQ_INT}
    maker = makers[source.spec.bits](device="cuda:0", dtype=dtype)
    scale, zero = source.scale.reshape(-1, 1), source.zero.reshape(-1, 1)
    layer = maker.from_weights(source.codes, scale.to(dtype), zero.to(dtype), bias=None)
    return lambda x, weight: weight(x), layer


def build_conch(source: Source, dtype: Any):
    """Conch's Triton kernel: 32-bit words along K."""
    gemm: Any = importlib.import_module("conch.ops.quantization.gemm")
    torch, spec = source.torch, source.spec
    per_word = 32 // spec.bits
    fields = source.codes.t().reshape(-1, per_word, spec.out_features).to(torch.int64)
    shifts = torch.arange(per_word, device=fields.device) * spec.bits
    words = (fields << shifts[None, :, None]).sum(1)
    packed = (words - ((words >> 31) << 32)).to(torch.int32).contiguous()
    zero = None if spec.symmetric else source.zero.t().contiguous().to(dtype)
    weight = packed, source.scale.t().contiguous().to(dtype), zero

    def multiply(x, weight):
        bias = spec.offset if spec.symmetric else 0
        return gemm.mixed_precision_gemm(x, *weight, spec.bits, bias, spec.group_size)

    return multiply, weight


def build_humming(source: Source, dtype: Any):
    """Humming's CUDA kernels, compiled when they are first used; it rounds the weight itself."""
    layer_module: Any = importlib.import_module("humming.layer")
    spec = source.spec
    group = 0 if spec.groups == 1 else spec.group_size
    config = {
        "dtype": f"uint{spec.bits}",
        "group_size": group,
        "has_zero_point": not spec.symmetric,
    }
    layer = layer_module.HummingLayer(
        shape_n=spec.out_features,
        shape_k=spec.in_features,
        weight_config=config,
        torch_dtype=dtype,
    ).cuda()
    layer.load_from_unquantized(source.expand().to(dtype))
    layer.transform()
    return lambda x, weight: weight(x), layer


BUILDERS: dict[str, tuple[str, str, Builder]] = {
    "torch bf16": ("torch", "torch", build_cublas),
    "tinygemm": ("torch", "torch", build_tinygemm),
    "gemlite": ("gemlite", "gemlite", build_gemlite),
    "humming": ("humming", "humming-kernels", build_humming),
    "conch": ("conch", "conch-triton-kernels", build_conch),
}
"""Name -> the module it needs beside torch, the package that has it, and what builds its weight."""


def main() -> None:
    """Do what stdin orders."""
    order = json.load(sys.stdin)
    cases = [
        Case(QuantSpec(**case["spec"]), case["tokens"], case["dtype"]) for case in order["cases"]
    ]
    serve(order["peer"], cases, Effort(**order["effort"]), _say)


def _say(message: dict[str, Any]) -> None:
    print(MARK + json.dumps(message), flush=True)


def serve(
    name: str, cases: list[Case], effort: Effort, say: Callable[[dict[str, Any]], None]
) -> None:
    """Time one peer on every case; what fails is said, and the next case goes on."""
    module, package, build = BUILDERS[name]
    missing = [wanted for wanted in ("torch", module) if not importlib.util.find_spec(wanted)]
    if missing:
        say({"absent": f"{missing[0]} is not installed"})
        return
    try:
        torch: Any = importlib.import_module("torch")
        if not torch.cuda.is_available():
            say({"absent": "PyTorch sees no CUDA GPU"})
            return
        importlib.import_module(module)
    except Exception as error:
        say({"absent": describe_failure(error)})
        return
    say({"version": _find_version(package)})
    held: tuple[QuantSpec, Any] | None = None
    for place, case in enumerate(cases):
        try:
            if held is None or held[0] != case.spec:
                held = None  # frees the last weight first
                held = case.spec, _make_copies(torch, build, case, effort)
            with torch.inference_mode():
                found = _time(torch, case, effort, *held[1])
        except Exception as error:
            found = {"error": describe_failure(error)}
        say({"case": place, **found})


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _make_copies(torch: Any, build: Builder, case: Case, effort: Effort):
    """The peer's product, its weights in the number that our own would have, and W itself."""
    source = _draw(torch, case)
    multiply, first = build(source, getattr(torch, case.dtype))
    size = case.float_bytes if build is build_cublas else case.packed_bytes
    count = min(max(2, math.ceil(effort.cold_bytes / size)), 512)
    weights = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
    return multiply, weights, source


def _draw(torch: Any, case: Case) -> Source:
    spec, generator = case.spec, torch.Generator(device="cuda").manual_seed(0)
    top, grouped = 1 << spec.bits, (spec.out_features, spec.groups)
    size = 1 / math.sqrt(spec.in_features * (top**2 - 1) / 6)

    def draw_integers(shape):
        return torch.randint(0, top, shape, generator=generator, device="cuda", dtype=torch.uint8)

    scale = torch.rand(grouped, generator=generator, device="cuda") * size + size / 2
    dtype = getattr(torch, case.dtype)
    zero = torch.full_like(scale, spec.offset) if spec.symmetric else draw_integers(grouped)
    codes = draw_integers((spec.out_features, spec.in_features))
    return Source(torch, spec, codes, scale.to(dtype), zero.to(dtype))


def _time(torch: Any, case: Case, effort: Effort, multiply, weights, source) -> dict[str, Any]:
    shape = (case.tokens, case.spec.in_features)
    x = torch.randn(shape, device="cuda").to(getattr(torch, case.dtype))
    y, exact = multiply(x, weights[0]).float(), x.float() @ source.expand().t()
    error = float((y - exact).norm() / exact.norm())
    layers = max(count_layers(case, effort), min(len(weights), 512))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            multiply(x, weights[i % len(weights)])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(layers):
            multiply(x, weights[i % len(weights)])
    timing = measure(
        lambda made: graph.replay(), lambda last: torch.cuda.synchronize(), effort, products=layers
    )
    return {CHAINED: dataclasses.asdict(timing), "layers": layers, "relative_error": error}


if __name__ == "__main__":
    main()
