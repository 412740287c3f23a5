"""Other projects' kernels for a linear layer, in PyTorch: each builds its product from a source."""

from __future__ import annotations

import importlib
from typing import Any

from jaxwna16.bench.peer_sources import Product, Source, UnservedError
from pallas_kernels.format.spec import QuantSpec


def build_cublas(source: Source, dtype: Any) -> Product:
    """The plain product in 16-bit floats."""
    return Product(source.torch.nn.functional.linear, source.expand().to(dtype))


def build_tinygemm(source: Source, dtype: Any) -> Product:
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

    return Product(multiply, (packed, both))


def build_gemlite(source: Source, dtype: Any) -> Product:
    """GemLite's Triton kernels, with its default tuning."""
    helper: Any = importlib.import_module("gemlite.helper")
    makers = {4: helper.A16W4_HQQ_INT, 8: helper.A16W8_HQQ_INT}
    maker = makers[source.spec.bits](device="cuda:0", dtype=dtype)
    scale, zero = source.scale.reshape(-1, 1), source.zero.reshape(-1, 1)
    layer = maker.from_weights(source.codes, scale.to(dtype), zero.to(dtype), bias=None)
    return Product(lambda x, weight: weight(x), layer)


def build_conch(source: Source, dtype: Any) -> Product:
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

    return Product(multiply, weight)


def build_humming(source: Source, dtype: Any) -> Product:
    """Humming's CUDA kernels, compiled when they are first used; it rounds the weight itself."""
    layer = make_humming_layer(source.spec, source.expand().to(dtype))
    return Product(lambda x, weight: weight(x), layer)


def make_humming_layer(spec: QuantSpec, weight: Any) -> Any:
    """Humming's layer for float weights, [N, K] or those of experts stacked."""
    layer_module: Any = importlib.import_module("humming.layer")
    experts = {} if weight.ndim == 2 else {"num_experts": weight.shape[0]}
    layer = layer_module.HummingLayer(
        shape_n=spec.out_features,
        shape_k=spec.in_features,
        weight_config={
            "dtype": f"uint{spec.bits}",
            "group_size": 0 if spec.groups == 1 else spec.group_size,
            "has_zero_point": not spec.symmetric,
        },
        torch_dtype=weight.dtype,
        **experts,
    ).cuda()
    layer.load_from_unquantized(weight)
    layer.transform()
    return layer
