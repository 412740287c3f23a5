"""Writes the golden files beside it: small modules as old versions packed them.

Run once for each version of compressed-tensors, in an environment of its own with torch and
safetensors:

    pip install compressed-tensors==0.8.1 && python make_golden.py
    pip install compressed-tensors==0.9.3 && python make_golden.py
    pip install compressed-tensors==0.17.0 && python make_golden.py
    pip install compressed-tensors==0.18.0 && python make_golden.py

`ct-VERSION.safetensors` holds the tensors as that version's own compressor gives them, and beside
each module "MODULE.expected", what its own decompressor makes of them; `ct-VERSION.json` the
quantization_config. Floats are bfloat16, scales too.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

VERSION = compressed_tensors.__version__
NUMBER = tuple(int(part) for part in VERSION.split(".")[:3])
N = 9
IS_OLD = NUMBER < (0, 9, 4)  # zero points were not packed then


def list_modules() -> dict[str, tuple[int, QuantizationArgs, bool]]:
    """Name -> K, arguments, whether the features are reordered."""
    modules = {}
    for bits in (4,) if IS_OLD else (3, 5, 6, 7):
        facts: dict[str, Any] = {"num_bits": bits, "symmetric": False}
        modules[f"w{bits}_g32"] = (64, _group(32, facts), False)
        channel = QuantizationArgs(**facts | {"symmetric": True, "strategy": "channel"})
        modules[f"w{bits}_channel"] = (50, channel, False)
    four = {"num_bits": 4, "symmetric": False}
    reordered = four | {"actorder": "group"}
    if NUMBER < (0, 9):
        modules["zero_points_of_zero"] = (64, _group(32, four), False)
    if IS_OLD:
        modules["one_short_group"] = (24, _group(32, four), False)
    if NUMBER < (0, 18):
        modules["reordered"] = (64, _group(32, reordered), True)
        modules["column_order"] = (64, _group(32, reordered | {"symmetric": True}), False)
    return modules


def _group(size: int, facts: dict[str, Any]) -> QuantizationArgs:
    return QuantizationArgs(**facts | {"strategy": "group", "group_size": size})


def make_module(
    k: int, args: QuantizationArgs, reordered: bool, even: bool, seed: int
) -> dict[str, torch.Tensor]:
    """A random weight and its parameters; zero points are 0 where it is `even`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, k, generator=generator).bfloat16()
    size = args.group_size or k
    groups = torch.arange(k) // size
    if reordered:
        groups = groups[torch.randperm(k, generator=generator)]
    order = groups.argsort(stable=True)
    split = weight[:, order].split(size, dim=1)
    low, high = (torch.stack([f(part, 1) for part in split], 1) for f in (torch.amin, torch.amax))
    scale, zero_point = calculate_qparams(low, high, args)
    state = {"weight": weight, "weight_scale": scale.bfloat16()}
    state["weight_zero_point"] = zero_point.to(torch.int8) * (not even)
    if args.actorder is not None:
        state["weight_g_idx"] = groups.int() if reordered else torch.full((k,), -1).int()
    return state


def compress(state: dict[str, torch.Tensor], args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """What the version writes for a module, and "expected"."""
    if not IS_OLD:
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        tensors = PackedQuantizationCompressor.compress(dict(state), scheme)
        expected = PackedQuantizationCompressor.decompress(dict(tensors), scheme)["weight"]
        return tensors | {"expected": expected}
    keywords = {"config": None} if NUMBER < (0, 9) else {}
    compressor = PackedQuantizationCompressor(**keywords)
    named = {f"m.{name}": tensor for name, tensor in state.items()}
    tensors = compressor.compress(named, names_to_scheme={"m": args})
    tensors = {name.removeprefix("m."): tensor for name, tensor in tensors.items()}
    return tensors | {"expected": compressor.decompress_weight(tensors, args)}


def main() -> None:
    """Write both files."""
    tensors, groups = {}, {}
    for seed, (name, (k, args, reordered)) in enumerate(list_modules().items()):
        even = name == "zero_points_of_zero"
        found = compress(make_module(k, args, reordered, even, seed), args)
        tensors |= {f"{name}.{role}": tensor.contiguous() for role, tensor in found.items()}
        weights = args.model_dump(mode="json") if hasattr(args, "model_dump") else args.dict()
        groups[f"group_{seed}"] = {"targets": [name], "weights": weights}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        "ignore": [],
    }
    config |= {} if IS_OLD else {"version": VERSION}  # it was written from then on
    folder = Path(inspect.getfile(main)).parent
    save_file(tensors, folder / f"ct-{VERSION}.safetensors")
    text = json.dumps(config, separators=(",", ":")) + "\n"
    (folder / f"ct-{VERSION}.json").write_text(text)
    (folder / f"ct-{VERSION}.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
