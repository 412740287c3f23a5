"""Folders of transformers models whose weights compressed-tensors itself has quantized."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import compressed_tensors
import transformers
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationStatus,
)
from safetensors.torch import load_file, save_file

from pallas_kernels import QuantSpec
from tests.checkpoints import compress, decompress, make_args, make_scheme
from tests.jaxwna16.models.family_rows import Row

transformers.utils.logging.disable_progress_bar()

KEPT = (
    "embed_tokens",
    "lm_head",
    "mlp.gate",
    "mlp.gate.wg",
    "block_sparse_moe.gate",
    "block_sparse_moe.router.layer",
    "shared_expert_gate",
    "router.proj",
    "embed_tokens_per_layer",
)
"""Ends of the paths of what is not quantized; routers are never, by anyone."""

PARALLEL = {
    "input_linear.weight": ("gate_proj", "up_proj"),
    "output_linear.weight": ("down_proj",),
    "experts.gate_up_proj": ("gate_proj", "up_proj"),
    "experts.down_proj": ("down_proj",),
}
"""Ends of the names of stacks of experts that are no joint projections -> what their rows are."""


class Folders(NamedTuple):
    """One model twice: packed, and with the floats that its packed weights stand for."""

    packed: Path
    floats: Path


def write_folders(
    reference,
    folder: Path,
    args: QuantizationArgs,
    down_args: QuantizationArgs | None = None,
    ignore: Sequence[str] = (),
) -> Folders:
    """Save a transformers model, quantize every linear and expert, and decompress them again.

    Args:
      reference: the model; transformers writes its experts one by one, under published names.
      folder: where to write.
      args: how weights are quantized.
      down_args: how the experts' down projections are, if differently.
      ignore: patterns of what else is not quantized, as compressed-tensors' `ignore` has them.
    """
    source, folders = folder / "source", Folders(folder / "packed", folder / "floats")
    reference.save_pretrained(source)
    patterns = [re.compile(pattern.removeprefix("re:")) for pattern in ignore]
    config = json.loads((source / "config.json").read_text())
    packed, kept, floats = {}, [], load_file(source / "model.safetensors")
    for name in [name for name in floats if name.endswith(tuple(PARALLEL))]:
        packed |= _pack_parallel(name, floats, args)
    for name, weight in list(floats.items()):
        path = name.removesuffix(".weight")
        ignored = any(pattern.match(path) for pattern in patterns)
        if name.endswith(tuple(PARALLEL)):
            continue
        if path == name or weight.ndim != 2 or path.endswith(KEPT) or ignored:
            packed[name] = weight
            named = path != name and weight.ndim == 2
            named = named and not path.endswith("embed_tokens") and not ignored
            kept += [path] if named else []
            continue
        own = down_args if down_args is not None and is_down(path) else args
        roles = compress(weight, own)
        packed |= {f"{path}.{role}": tensor.contiguous() for role, tensor in roles.items()}
        floats[name] = decompress(roles, own).float()
    groups = {"rest": make_scheme(args)}
    if down_args is not None:
        groups["down"] = make_scheme(down_args, r"re:.*experts\.\d+\.(down_proj|w2)$")
    quantization = QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[*kept, *ignore],
    )
    described = quantization.model_dump(mode="json") | {"version": compressed_tensors.__version__}
    for path, tensors, extra in (
        (folders.packed, packed, {"quantization_config": described}),
        (folders.floats, floats, {}),
    ):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | extra))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return folders


def _pack_parallel(name: str, floats: dict, args: QuantizationArgs) -> dict:
    """The experts of a stack one by one, as llm-compressor takes them apart.

    Args:
      name: of a stack in `floats`, where it is replaced by what its packed weights stand for.
    """
    (end, kinds), packed = next((e, k) for e, k in PARALLEL.items() if name.endswith(e)), {}
    rows = floats[name].shape[1] // len(kinds)
    floats[name] = stack = floats[name].clone()
    for expert, weights in enumerate(stack):
        for kind, weight in zip(kinds, weights.split(rows), strict=True):
            roles = compress(weight, args)
            path = f"{name.removesuffix(end)}experts.{expert}.{kind}"
            packed |= {f"{path}.{role}": tensor.contiguous() for role, tensor in roles.items()}
            weight.copy_(decompress(roles, args).float())
    return packed


def write_row(reference, row: Row, folder: Path) -> Folders:
    """`write_folders` of a small model, packed as the row of its family says."""
    spec = QuantSpec(
        bits=row.bits,
        group_size=row.group_size,
        symmetric=row.symmetric,
        in_features=128,
        out_features=128,
    )
    return write_folders(reference, folder, make_args(spec, row.scale_dtype), ignore=row.ignore)


def is_down(path: str) -> bool:
    return ".experts." in path and path.endswith((".down_proj", ".w2"))


def load_reference(folders: Folders):
    """transformers' own model of the floats, read from their folder."""
    config = json.loads((folders.floats / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(
        folders.floats, attn_implementation="eager", dtype="float32"
    )
    return model.eval()
