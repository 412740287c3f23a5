"""What a checkpoint folder holds, read without the loader: safetensors, compressed-tensors, NumPy.

`expect` writes every leaf of the params tree down from the definitions in
`pallas_kernels.format.layout` and from the format: words -> bits -> integers -> tiles, one step at
a time, in NumPy.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.utils.match import match_name, match_targets
from safetensors import SafetensorError, deserialize

from tests.fuzz.bases import DTYPES

_NUMPY = {code: np.dtype(getattr(ml_dtypes, name, name)) for name, code in DTYPES.items()}
_NUMPY |= {
    "U8": np.dtype(np.uint8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(.*)")
_STACKED = re.compile(r"(.*experts)\.(gate_up_proj|down_proj)\.(.*)")
_STACKS = {"gate_up_proj": "w13", "gate_proj": "w13", "up_proj": "w13", "down_proj": "w2"}
_AWQ = ("qweight", "qzeros")
_LINEAR = torch.nn.Linear(1, 1)

Tensors = Mapping[str, np.ndarray]
Leaves = dict[str, np.ndarray]


class RefusedError(Exception):
    """safetensors or compressed-tensors cannot read what the loader reads."""


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, read by safetensors."""
    index, manifest = folder / "model.safetensors.index.json", folder / "jaxwna16.json"
    names = {"model.safetensors"}
    if manifest.exists():
        entries = json.loads(manifest.read_text())["tensors"].values()
        names = {entry["file"] for entry in entries}
    elif index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
    tensors = {}
    for name in sorted(names):
        try:
            found = deserialize((folder / name).read_bytes())
        except SafetensorError as error:
            raise RefusedError(error) from error
        for key, held in found:
            array = np.frombuffer(held["data"], _NUMPY[held["dtype"]])
            tensors[key] = array.reshape(held["shape"])
    return tensors


def expect(
    folder: Path, found: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None
) -> Leaves:
    """The leaves of the params tree by name.

    Args:
      folder: the checkpoint.
      found: the leaves that the loader gave; of these, any order of features within a group is
        taken as given (`perm`).
      config: what to take in place of its config.json.

    Raises:
      RefusedError: if safetensors cannot read it, or compressed-tensors the config.
    """
    if config is None:
        config = json.loads((folder / "config.json").read_text())
    leaves: Leaves = read_tensors(folder)
    if (folder / "jaxwna16.json").exists():
        return leaves  # a converted copy, which holds just these
    modules: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name, array in leaves.items():
        path, _, role = name.rpartition(".")
        modules[path][role] = array
    experts: dict[str, dict[tuple[int, str], Leaves]] = defaultdict(dict)
    for path, held in modules.items():
        if "weight_packed" not in held and "qweight" not in held:
            continue
        for role in held:
            del leaves[f"{path}.{role}"]
        if "qweight" in held:
            module = decode_transposed(held, config, found.get(f"{path}.perm"))
            leaves |= {f"{path}.{name}": leaf for name, leaf in lay_out(module).items()}
            continue
        for where, part, own in _split(path, held):
            perm = found.get(f"{path}.perm") if where is None else None
            module = decode(own, *_find_scheme(config, path), perm)
            if where is None:
                leaves |= {f"{path}.{name}": leaf for name, leaf in lay_out(module).items()}
            else:
                experts[where][part] = module
    for path, parts in experts.items():
        leaves |= _stack(path, parts)
    return leaves


def decode(held: Tensors, args: QuantizationArgs, version: str, perm: np.ndarray | None) -> Leaves:
    """The leaves of one module, rows not yet padded and integers not yet in tiles."""
    n, k = (int(size) for size in held["weight_shape"][-2:])
    bits, wide = args.num_bits, 4 if args.num_bits <= 4 else 8
    size = k if args.group_size in (None, -1) or args.group_size > k else args.group_size
    aligned = _is_aligned(held["weight_packed"].shape[1], k, bits, version)
    shift = 2 ** (wide - 1) - 2 ** (bits - 1)
    codes = unpack(held["weight_packed"], bits, k, aligned) + shift
    scale = held["weight_scale"]
    leaves = {"codes": codes, "scale": scale, "bits": np.array(wide)}
    if not args.symmetric:
        zeros = held.get("weight_zero_point")
        if zeros is None:
            zeros = np.zeros(scale.shape, np.int8)
        elif zeros.dtype != np.int8:
            zeros = unpack(zeros.T, bits, n, aligned).T - 2 ** (bits - 1)
        leaves["zero_point"] = zeros.astype(np.int8)
    if "weight_g_idx" in held:
        leaves |= _reorder(codes, held["weight_g_idx"], size, perm)
    return leaves | ({"bias": held["bias"]} if "bias" in held else {})


def decode_transposed(held: Tensors, config: Mapping[str, Any], perm: np.ndarray | None) -> Leaves:
    """The same of a module of AutoAWQ or GPTQ, by the formulas that these document."""
    # a field that is null is one that is left out, and the base's is the default of all tools
    raw = {k: v for k, v in config["quantization_config"].items() if v is not None}
    try:
        bits, size = raw["bits"], raw["group_size"]
        awq = raw["quant_method"].lower() == "awq"
        symmetric = not raw["zero_point"] if awq else raw["sym"]
        less = 0 if awq or raw.get("checkpoint_format") == "gptq_v2" else 1
        reordered = not awq and raw["desc_act"]
    except (KeyError, AttributeError) as error:
        raise RefusedError(error) from error
    if awq:
        codes, zeros = (unpack(held[name], 4, held["scales"].shape[1], False) for name in _AWQ)
        order = np.arange(codes.shape[1]).reshape(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(-1)
        codes, zeros = codes[:, order].T, zeros[:, order]
    else:
        n = held["scales"].shape[1]
        codes = unpack(held["qweight"].T, bits, held["qweight"].shape[0] * 32 // bits, False)
        zeros = unpack(held["qzeros"], bits, n, False) + less
    wide = 4 if bits <= 4 else 8
    shift = 2 ** (wide - 1) - 2 ** (bits - 1)
    leaves = {"codes": codes + shift, "scale": held["scales"].T, "bits": np.array(wide)}
    if not symmetric:
        leaves["zero_point"] = (zeros.T - 2 ** (bits - 1)).astype(np.int8)
    if reordered and held["scales"].shape[0] > 1:
        leaves |= _reorder(leaves["codes"], held["g_idx"], size, perm)
    return leaves | ({"bias": held["bias"]} if "bias" in held else {})


def _reorder(codes: np.ndarray, groups: np.ndarray, size: int, perm: np.ndarray | None) -> Leaves:
    """Input features in the loader's order, which has to be one by groups."""
    in_order = np.arange(codes.shape[1]) // size
    assert perm is not None and sorted(perm) == list(range(codes.shape[1]))
    groups = in_order if (groups < 0).all() else groups
    np.testing.assert_array_equal(groups[perm], in_order)
    return {"codes": codes[:, perm], "perm": np.asarray(perm, np.int32)}


def unpack(words: np.ndarray, bits: int, columns: int, aligned: bool) -> np.ndarray:
    """Unsigned integers [rows, columns] of int32 words [rows, any]."""
    rows = np.ascontiguousarray(words).view(np.uint8)
    stream = np.unpackbits(rows, axis=1, bitorder="little")
    if aligned:
        per_word = 32 // bits
        stream = stream.reshape(len(rows), -1, 32)[:, :, : per_word * bits].reshape(len(rows), -1)
    fields = stream[:, : columns * bits].reshape(len(rows), columns, bits)
    return fields.astype(np.int32) @ (1 << np.arange(bits))


def lay_out(module: Leaves) -> Leaves:
    """Put the integers of a module [.., N, K] into tiles, and pad N to whole ones of 64."""
    bits, codes = int(module["bits"]), module["codes"]
    planes = 16 // bits
    n, k = codes.shape[-2:]
    rows, slabs = -(-n // 64), -(-k // (32 * planes))
    lead = [(0, 0)] * (codes.ndim - 2)
    padded = np.pad(codes, [*lead, (0, 64 * rows - n), (0, 32 * planes * slabs - k)])
    values = padded.reshape(*codes.shape[:-2], rows, 64, slabs, planes, 32).astype(np.uint32)
    tiles = np.zeros((*codes.shape[:-2], rows, 64, slabs, 32), np.uint32)
    for i in range(planes):
        tiles |= values[..., i, :] << np.uint32(bits * i)
    leaves = {"packed": np.swapaxes(tiles, -3, -2).astype(np.uint16)}
    for name in ("scale", "zero_point"):
        if name in module:
            grouped = np.swapaxes(module[name], -1, -2)
            leaves[name] = np.pad(grouped, [*lead, (0, 0), (0, 64 * rows - n)])
    return leaves | {name: module[name] for name in ("bias", "perm") if name in module}


def _split(path: str, held: Tensors) -> Iterator[tuple[str | None, tuple[int, str], Tensors]]:
    """The module itself; or, of experts, where they go, which one it is, and its tensors."""
    single, stacked = _EXPERT.fullmatch(f"{path}."), _STACKED.fullmatch(f"{path}.")
    if single:
        yield single[1], (int(single[2]), single[3]), held
    elif stacked and held["weight_packed"].ndim == 3:
        for i in range(len(held["weight_packed"])):
            own = {role: a if role == "weight_shape" else a[i] for role, a in held.items()}
            yield stacked[1], (i, stacked[2]), own
    else:
        yield None, (0, ""), held


def _stack(path: str, parts: Mapping[tuple[int, str], Leaves]) -> Leaves:
    """w13 and w2 of a layer, the experts in front, rows of gate before those of up."""
    stacks: dict[str, dict[int, list[Leaves]]] = defaultdict(lambda: defaultdict(list))
    for kind in ("gate_up_proj", "gate_proj", "up_proj", "down_proj"):
        for expert in sorted({number for number, _ in parts}):
            if (expert, kind) in parts:
                stacks[_STACKS[kind]][expert].append(parts[expert, kind])
    leaves: Leaves = {}
    for name, experts in stacks.items():
        if _are_unlike([part for own in experts.values() for part in own]):
            parts_of = [[_dequantize(part) for part in own] for own in experts.values()]
            dtypes = {floats.dtype for own in parts_of for floats in own}
            dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
            floats = [np.concatenate([part.astype(dtype) for part in own]) for own in parts_of]
            leaves[f"{path}.{name}.weight"] = np.stack(floats)
            biases = [[p["bias"] for p in own if "bias" in p] for own in experts.values()]
            if biases[0]:
                leaves[f"{path}.{name}.bias"] = np.stack([np.concatenate(own) for own in biases])
            continue
        joined = {
            leaf: np.stack(
                [np.concatenate([part[leaf] for part in own]) for own in experts.values()]
            )
            for leaf in experts[0][0]
            if leaf != "bits"
        }
        joined["bits"] = experts[0][0]["bits"]
        leaves |= {f"{path}.{name}.{leaf}": array for leaf, array in lay_out(joined).items()}
    return leaves


def _are_unlike(parts: list[Leaves]) -> bool:
    """Whether one array of integers cannot hold them: their widths, groups, dtypes differ."""
    kinds = {
        (int(p["bits"]), p["scale"].dtype.name, p["scale"].shape[1], "zero_point" in p)
        for p in parts
    }
    return len(kinds) > 1


def _dequantize(module: Leaves) -> np.ndarray:
    """[N, K] of one module in column order, rounded to the dtype of its scales."""
    codes, scale = module["codes"].astype(np.int32), module["scale"]
    size = codes.shape[1] // scale.shape[1]
    zeros = module.get("zero_point", np.zeros(scale.shape, np.int8)).astype(np.int32)
    q = codes - 2 ** (int(module["bits"]) - 1) - np.repeat(zeros, size, axis=1)
    return (q.astype(np.float32) * np.repeat(scale.astype(np.float32), size, axis=1)).astype(
        scale.dtype
    )


def _find_scheme(config: Mapping[str, Any], path: str) -> tuple[QuantizationArgs, str]:
    """What compressed-tensors says of a module, and the version that wrote it."""
    raw = config.get("quantization_config") or config["compression_config"]
    assert not any(match_name(path, name) for name in raw.get("ignore") or []), path
    schemes: dict[str, Any] = {}
    for name, group in raw["config_groups"].items():
        try:
            parsed = QuantizationConfig.model_validate(
                {"config_groups": {name: _drop_order(group)}}
            )
        except (ValueError, KeyError, TypeError) as error:
            targets = group["targets"] if isinstance(group, dict) else group
            schemes |= dict.fromkeys(targets, error)
        else:
            groups: Any = parsed.config_groups
            schemes |= {target: s for s in groups.values() for target in s.targets}
    matches = match_targets(path, _LINEAR, list(schemes))
    found = schemes[matches[0]] if matches else ValueError(f"{path} is in no group")
    if isinstance(found, Exception) or found.weights is None:
        raise RefusedError(found)
    return found.weights, str(raw.get("version") or "")


def _is_aligned(words: int, columns: int, bits: int, version: str) -> bool:
    """By the number of words, and where that does not tell, by the version (0.17 and before)."""
    ways = {True: -(-columns // (32 // bits)), False: -(-columns * bits // 32)}
    fits = [way for way, count in ways.items() if count == words]
    if len(fits) == 2 and 32 % bits:
        return tuple(map(int, version.split(".")[:2])) < (0, 18)
    return fits[0]


def _drop_order(group: Any) -> Any:
    """A group without actorder "group", of which 0.20 knows no more; `weight_g_idx` says it."""
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        return group
    weights = {k: v for k, v in group["weights"].items() if (k, v) != ("actorder", "group")}
    return group | {"weights": weights}
