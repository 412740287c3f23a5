"""Small checkpoint folders written without torch, also faulty ones, byte by byte if need be."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from loaders.files.folder import INDEX, SINGLE
from pallas_kernels.format.spec import QuantSpec


def write_bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes [rows, columns] -> int32 words, bit by bit from the definition."""
    columns = codes.astype(np.uint8)[..., None]
    stream = np.unpackbits(columns, axis=2, count=bits, bitorder="little").reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view("<i4").astype(np.int32)


def make_codes(spec: QuantSpec, seed: int = 0) -> np.ndarray:
    """Random codes uint8 [N, K]."""
    shape = (spec.out_features, spec.in_features)
    return np.random.default_rng(seed).integers(0, 2**spec.bits, shape).astype(np.uint8)


def make_tensors(
    spec: QuantSpec, *, scale_dtype: Any = np.float32, seed: int = 0
) -> dict[str, np.ndarray]:
    """A random quantized module as it lies in a checkpoint, by role."""
    rng = np.random.default_rng(seed)
    grouped = (spec.out_features, spec.groups)
    tensors = {
        "weight_packed": write_bit_stream(make_codes(spec, seed), spec.bits),
        "weight_scale": rng.uniform(0.005, 0.02, grouped).astype(scale_dtype),
        "weight_shape": np.array([spec.out_features, spec.in_features], np.int64),
    }
    if not spec.symmetric:
        zeros = rng.integers(0, 2**spec.bits, grouped[::-1])
        tensors["weight_zero_point"] = write_bit_stream(zeros, spec.bits).T.copy()
    return tensors


def make_experts(
    path: str, first: QuantSpec, second: QuantSpec, *, names: Sequence[str], experts: int
) -> dict[str, np.ndarray]:
    """Random experts as they lie in a checkpoint, by full tensor names.

    Args:
      path: of the experts, "….experts".
      first: spec of every projection but the last.
      second: spec of the last one.
      names: of the projections.
      experts: how many.
    """
    return {
        f"{path}.{expert}.{name}.{role}": array
        for expert in range(experts)
        for i, name in enumerate(names)
        for spec in [second if name == names[-1] else first]
        for role, array in make_tensors(spec, seed=10 * expert + i).items()
    }


def make_config(
    *specs: QuantSpec, targets: Sequence[Sequence[str]] = (("Linear",),), **changes: Any
) -> dict:
    """A config.json with a group for each spec; `changes` overwrite fields of its quantization."""
    groups = {
        f"group_{i}": {"targets": list(names), "weights": describe_weights(spec)}
        for i, (spec, names) in enumerate(zip(specs, targets, strict=True))
    }
    return {"quantization_config": describe_groups(groups) | {"ignore": []} | changes}


def describe_groups(groups: Mapping[str, Any], *, version: str | None = "0.20.0") -> dict[str, Any]:
    """The `quantization_config` of these `config_groups`; a version of None is not stated."""
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
    }
    return quantization | ({} if version is None else {"version": version})


def describe_linears(weights: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """The `quantization_config` that packs every Linear alike; `facts` as in `describe_groups`."""
    return describe_groups({"group_0": {"targets": ["Linear"], "weights": weights}}, **facts)


def describe_weights(spec: QuantSpec) -> dict[str, Any]:
    """The `weights` of a config group."""
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "group",
        "group_size": spec.group_size,
    }


def prefix_names(module: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Roles -> full tensor names."""
    return {f"{module}.{role}": array for role, array in tensors.items()}


def write_folder(folder: Path, config: Mapping, shards: Sequence[Mapping[str, np.ndarray]]) -> Path:
    """Write config.json and one file, or several with their index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        save_file(dict(shards[0]), folder / SINGLE)
        return folder
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(dict(shard), folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a safetensors file of any header (bytes as they are, else JSON) and any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def describe_entry(dtype: str, shape: Any, *offsets: Any) -> dict[str, Any]:
    """A tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}
