"""Valid tiny checkpoints that mutants are made of, as file names and their bytes."""

from __future__ import annotations

import functools
import json
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxwna16.checkpoints.convert import convert_checkpoint
from loaders.converted.manifest import MANIFEST, hash_table
from loaders.files.folder import CONFIG, INDEX, SINGLE
from tests.awq_gptq import describe_awq, describe_gptq, make_linear, pack_awq, pack_gptq
from tests.folders import write_bit_stream

DTYPES = {
    "bool": "BOOL",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
Tensors = dict[str, np.ndarray]


@functools.cache
def make_bases() -> dict[str, dict[str, bytes]]:
    """Name -> the files of a checkpoint, always the same."""
    return {
        "asymmetric": _make_dense(4, symmetric=False, group=32, scale=np.float16),
        "symmetric, shards": _make_dense(8, symmetric=True, group=32, scale=np.float32, shards=2),
        "channel": _make_dense(4, symmetric=False, group=-1, n=5, k=33, scale=np.float32),
        "3 bits": _make_dense(3, symmetric=False, group=32, k=64, version="0.20.0"),
        "3 bits of 0.17": _make_dense(
            3, symmetric=False, group=-1, k=20, version="0.17.0", aligned=True
        ),
        "5 bits of 0.17": _make_dense(5, symmetric=True, group=32, version="0.17.1", aligned=True),
        "act-order": _make_dense(4, symmetric=False, group=32, k=64, reordered=True),
        "old": _make_dense(8, symmetric=False, group=32, k=64, version=None, legacy=True),
        "experts": _make_experts(stacked=False),
        "stacked experts": _make_experts(stacked=True),
        "llama": _make_llama(),
        "AWQ": _make_transposed("awq"),
        "GPTQ, act-order": _make_transposed("gptq"),
        "converted": _convert(_make_dense(4, symmetric=False, group=32)),
    }


def write_file(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file of these tensors, in their order."""
    header, data = {}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": offsets,
        }
        data += raw
    return join_file(json.dumps(header).encode(), data)


def join_file(header: bytes, data: bytes) -> bytes:
    """A safetensors file of this header and these bytes, whatever they are."""
    return struct.pack("<Q", len(header)) + header + data


def write_files(config: Mapping[str, Any], shards: Sequence[Tensors]) -> dict[str, bytes]:
    """The files of a checkpoint of one shard, or of several with their index."""
    files = {CONFIG: json.dumps(config).encode()}
    if len(shards) == 1:
        return files | {SINGLE: write_file(shards[0])}
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        files[name] = write_file(shard)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    return files | {INDEX: json.dumps(index).encode()}


def describe_weights(bits: int, symmetric: bool, group: int, **changes: Any) -> dict[str, Any]:
    """The `weights` of a config group; group -1 is a channel."""
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "dynamic": False,
        "actorder": None,
    } | changes


def describe(weights: Mapping[str, Mapping[str, Any]], version: str | None) -> dict[str, Any]:
    """A `quantization_config` with a group for each target."""
    groups = {
        f"group_{i}": {"targets": [target], "weights": dict(held), "input_activations": None}
        for i, (target, held) in enumerate(weights.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    } | ({} if version is None else {"version": version})


def _make_module(
    path: str,
    n: int,
    k: int,
    bits: int,
    *,
    symmetric: bool,
    group: int,
    scale: Any = ml_dtypes.bfloat16,
    aligned: bool = False,
    legacy: bool = False,
    reordered: bool = False,
    seed: int = 0,
) -> Tensors:
    rng = np.random.default_rng([seed, n, k, bits])
    groups = 1 if group == -1 else k // group
    codes = rng.integers(0, 2**bits, (n, k))
    zeros = rng.integers(0, 2**bits, (n, groups))
    write = _write_aligned if aligned else write_bit_stream
    tensors = {
        "weight_packed": write(codes, bits),
        "weight_scale": rng.uniform(0.01, 0.05, (n, groups)).astype(scale),
        "weight_shape": np.array([n, k], np.int32 if legacy else np.int64),
    }
    if not symmetric:
        signed = (zeros - 2 ** (bits - 1)).astype(np.int8)
        tensors["weight_zero_point"] = signed if legacy else write(zeros.T, bits).T.copy()
    if reordered:
        tensors["weight_g_idx"] = rng.permutation(
            np.repeat(np.arange(groups, dtype=np.int32), group)
        )
    return {f"{path}.{role}": array for role, array in tensors.items()}


def _write_aligned(codes: np.ndarray, bits: int) -> np.ndarray:
    """32 // bits whole values in every word."""
    per_word = 32 // bits
    rows = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
    rows = rows.reshape(len(rows), -1, per_word).astype(np.uint32)
    words = sum(rows[:, :, i] << np.uint32(bits * i) for i in range(per_word))
    return np.asarray(words, np.uint32).view(np.int32)


def _make_dense(
    bits: int,
    *,
    symmetric: bool,
    group: int,
    n: int = 9,
    k: int = 96,
    version: str | None = "0.20.0",
    shards: int = 1,
    reordered: bool = False,
    **options: Any,
) -> dict[str, bytes]:
    """Two modules, one with a bias, and plain tensors of several dtypes."""
    options |= {"symmetric": symmetric, "group": group, "reordered": reordered}
    q, k_proj = "model.layers.0.q_proj", "model.layers.0.k_proj"
    first = _make_module(q, n, k, bits, **options)
    first[f"{q}.bias"] = np.linspace(-1, 1, n).astype(np.float16)
    second = _make_module(k_proj, n, k, bits, seed=1, **options)
    second["model.norm.weight"] = np.linspace(0, 2, 6).astype(ml_dtypes.bfloat16)
    second["steps"] = np.array([2**40, -1])
    second["mean"] = np.array(0.1)
    second["mask"] = np.array([[True], [False]])
    order = "group" if reordered else None
    weights = describe_weights(bits, symmetric, group, actorder=order)
    config = {"quantization_config": describe({"Linear": weights}, version)}
    return write_files(config, [first, second] if shards == 2 else [first | second])


def _make_experts(*, stacked: bool) -> dict[str, bytes]:
    """Two experts of 16 inner features in a model of 32; groups of 16, the last product 8 bits."""
    path, tensors = "model.layers.0.mlp.experts", {}
    schemes = {"gate_proj": (4, 16, 32), "up_proj": (4, 16, 32), "down_proj": (8, 32, 16)}
    if stacked:
        schemes = {"gate_up_proj": (4, 32, 32), "down_proj": (8, 32, 16)}
    for name, (bits, n, k) in schemes.items():
        held = [
            _make_module("", n, k, bits, symmetric=False, group=16, seed=10 * expert + n)
            for expert in range(2)
        ]
        if stacked:
            shapes = {".weight_shape": np.array([2, n, k])}
            tensors |= {
                f"{path}.{name}{role}": shapes.get(role, np.stack([own[role] for own in held]))
                for role in held[0]
            }
        else:
            tensors |= {
                f"{path}.{expert}.{name}{role}": array
                for expert, own in enumerate(held)
                for role, array in own.items()
            }
    tensors["model.layers.0.mlp.gate.weight"] = np.ones((2, 32), ml_dtypes.bfloat16)
    weights = {
        "Linear": describe_weights(4, False, 16),
        "re:.*down_proj": describe_weights(8, False, 16),
    }
    config = {"num_experts": 2, "quantization_config": describe(weights, "0.20.0")}
    return write_files(config, [tensors])


def _make_transposed(tool: str) -> dict[str, bytes]:
    """A module of AutoAWQ or GPTQ, and a plain tensor."""
    linear = make_linear(16, 64, act_order=tool == "gptq")
    roles = pack_awq(linear) if tool == "awq" else pack_gptq(linear)
    described = describe_awq(linear) if tool == "awq" else describe_gptq(linear)
    tensors = {f"model.layers.0.q_proj.{role}": array for role, array in roles.items()}
    tensors["model.norm.weight"] = np.ones(6, np.float16)
    return write_files({"quantization_config": described}, [tensors])


def _convert(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The converted copy of a checkpoint that is no longer there, the same each time."""
    with tempfile.TemporaryDirectory() as root:
        source, copy = Path(root, "source"), Path(root, "copy")
        source.mkdir()
        for name, content in files.items():
            (source / name).write_bytes(content)
        convert_checkpoint(source, copy, progress=False)
        converted = {path.name: path.read_bytes() for path in sorted(copy.iterdir())}
    manifest = json.loads(converted[MANIFEST])
    manifest["source"]["folder"] = "/gone"
    for entry in manifest["source"]["files"].values():
        entry["mtime_ns"] = 0
    manifest["sha256"] = hash_table(manifest)
    return converted | {MANIFEST: json.dumps(manifest).encode()}


def _make_llama() -> dict[str, bytes]:
    """All tensors of a model of one layer, symmetric, and its whole config.json."""
    layer, sizes = "model.layers.0", {"k_proj": (16, 32), "v_proj": (16, 32)}
    tensors: Tensors = {"model.embed_tokens.weight": np.ones((8, 32), ml_dtypes.bfloat16)}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        n, k = sizes.get(name, (32, 32))
        options = {"symmetric": True, "group": 32}
        tensors |= _make_module(f"{layer}.self_attn.{name}", n, k, 4, **options)
    for i, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        tensors |= _make_module(f"{layer}.mlp.{name}", 32, 32, 4, symmetric=True, group=32, seed=i)
    norms = (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm")
    tensors |= {f"{name}.weight": np.ones(32, ml_dtypes.bfloat16) for name in norms}
    quantization = describe({"Linear": describe_weights(4, True, 32)}, "0.20.0")
    return write_files(LLAMA | {"quantization_config": quantization}, [tensors])
