"""Quantized modules and checkpoint folders made by compressed-tensors itself, our reference."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import compressed_tensors
import ml_dtypes
import numpy as np
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

from loaders.files.folder import INDEX, SINGLE
from pallas_kernels.format.spec import QuantSpec

SCALE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


def make_args(spec: QuantSpec, scale_dtype: str | None = None) -> QuantizationArgs:
    """The arguments of a spec; one group is strategy "channel"."""
    channel = spec.groups == 1
    return QuantizationArgs(
        num_bits=spec.bits,
        symmetric=spec.symmetric,
        strategy="channel" if channel else "group",
        group_size=None if channel else spec.group_size,
        scale_dtype=None if scale_dtype is None else SCALE_DTYPES[scale_dtype],
    )


def make_scheme(args: QuantizationArgs, *targets: str) -> QuantizationScheme:
    """A scheme for weights alone."""
    return QuantizationScheme(targets=list(targets or ["Linear"]), weights=args)


def make_weight(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random float32 [..., N, K], each row at its own magnitude."""
    rng = np.random.default_rng(seed)
    rows = rng.uniform(0.01, 1, (*shape[:-1], 1))
    return torch.from_numpy((rows * rng.standard_normal(shape)).astype(np.float32))


def choose_parameters(
    weight: torch.Tensor, args: QuantizationArgs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [..., N, G] from the range of each group."""
    size = args.group_size or weight.shape[-1]
    groups = weight.reshape(*weight.shape[:-1], -1, size)
    return calculate_qparams(groups.amin(-1), groups.amax(-1), args)


def compress(weight: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """The tensors of one module by role; the scale has the dtype `args.scale_dtype`.

    A weight of experts [E, N, K] gives tensors with the experts in front.
    """
    scale, zero_point = choose_parameters(weight, args)
    if args.scale_dtype is not None:
        scale = scale.to(args.scale_dtype)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    return PackedQuantizationCompressor.compress(state, make_scheme(args))


def decompress(tensors: Mapping[str, Any], args: QuantizationArgs) -> torch.Tensor:
    """The float weight [..., N, K] of one module's tensors."""
    state = PackedQuantizationCompressor.decompress(dict(tensors), make_scheme(args))
    return state["weight"]


def pack_reordered(
    weight: torch.Tensor, args: QuantizationArgs, seed: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors as compressed-tensors up to 0.18 writes activation order, and the floats.

    Its groups are of features that do not follow each other; packed columns stay where they were.
    """
    k = weight.shape[1]
    groups = torch.arange(k) // (args.group_size or k)
    groups = groups[torch.randperm(k, generator=torch.Generator().manual_seed(seed))]
    order = groups.argsort(stable=True)
    back = order.argsort()
    tensors = compress(weight[:, order], args)
    floats = decompress(tensors, args)[:, back]
    codes = unpack_from_int32(tensors["weight_packed"], args.num_bits, weight.shape)
    tensors["weight_packed"] = pack_to_int32(codes[:, back].contiguous(), args.num_bits)
    return tensors | {"weight_g_idx": groups.int()}, floats


def write_folder(
    folder: Path,
    modules: Mapping[str, tuple[dict[str, torch.Tensor], QuantizationArgs]],
    *,
    shards: int = 1,
) -> Path:
    """Write a checkpoint of several modules, each a config group with its exact path as target.

    Tensors are dealt out to the shards at random.
    """
    groups = {
        f"group_{i}": make_scheme(args, path) for i, (path, (_, args)) in enumerate(modules.items())
    }
    quantization = QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    described = quantization.model_dump(mode="json") | {"version": compressed_tensors.__version__}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": described}))
    tensors = {
        f"{path}.{role}": tensor.contiguous()
        for path, (roles, _) in modules.items()
        for role, tensor in roles.items()
    }
    names = list(tensors)
    random.Random(0).shuffle(names)
    weight_map = {}
    for i in range(shards):
        file = SINGLE if shards == 1 else f"model-{i}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def read_files(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by safetensors itself."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same bits as a NumPy array, bfloat16 too."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same_bits(found: Any, expected: Any) -> None:
    """Dtype, shape and every bit are equal."""
    found, expected = (
        to_numpy(a) if isinstance(a, torch.Tensor) else np.asarray(a) for a in (found, expected)
    )
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    bits = np.dtype(f"u{found.dtype.itemsize}")
    np.testing.assert_array_equal(
        np.ascontiguousarray(found).view(bits), np.ascontiguousarray(expected).view(bits)
    )
