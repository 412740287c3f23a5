"""Checkpoint folder -> checkpoint folder: `quantize_checkpoint` and `dequantize_checkpoint`.

Both go tensor by tensor; memory is one shard of the output, or one tensor if that is larger.
Experts that are quantized become separate ones (`experts.3.gate_proj`), as compressed-tensors and
vLLM have them. All others stay as they are: stacked ones are stacked again when dequantized.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxwna16.checkpoint import resolve_folder
from jaxwna16.dtypes import read_dtype
from jaxwna16.errors import InputError
from jaxwna16.progress import show_bytes
from loaders.converted import plan_original
from loaders.errors import CheckpointError, Fault
from loaders.experts import name_separately
from loaders.modules import QuantizedModule
from loaders.patterns import compile_pattern
from loaders.plan import Plan
from loaders.quantization_config import SUBCONFIGS, are_tied, drop_quantization, name_classes
from loaders.repack import pack, unpack
from loaders.safetensors_file import TensorInfo, read_tensor, read_tensors
from loaders.stream import check_cast, check_scales
from loaders.write import write_checkpoint
from pallas_kernels.dequantize import dequantize
from pallas_kernels.errors import SpecError
from pallas_kernels.quantize import quantize
from pallas_kernels.spec import QuantSpec
from pallas_kernels.weights import SCALE_DTYPES

# the head, and the routers, which are small and choose other experts once they are rounded
DEFAULT_IGNORE = ("lm_head", r"re:(.*\.)?(gate|router|shared_expert_gate)$")
# the compressed-tensors version whose format is written; 4 and 8 bits are the same in all of them
FORMAT_VERSION = "0.20.0"
_HEAD = "lm_head"


def quantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    ignore: Iterable[str] = DEFAULT_IGNORE,
    dtype: Any = None,
    progress: bool | None = None,
    follow_links: bool = False,
) -> None:
    """Round the linear weights of a Hugging Face folder to the nearest integers.

    Writes a compressed-tensors `pack-quantized` checkpoint, which compressed-tensors, transformers
    and vLLM read. Linear weights are the 2-D tensors named `*.weight`, and experts also where they
    are stacked, but for embeddings, a head tied to one, and what `ignore` names. Scales have the
    dtype of the weights.

    Args:
      source: folder with config.json and safetensors files that are not quantized.
      destination: the folder to make; it must not exist.
      bits: 4 or 8.
      group_size: input features that share a scale, or -1 for one scale per output channel.
      symmetric: without zero points, or with.
      ignore: modules to leave alone: exact paths, or `re:` and a pattern anchored at the start. It
        replaces `DEFAULT_IGNORE`, the head and routers (`gate`, `router`, `shared_expert_gate`).
      dtype: float dtype the whole checkpoint is cast to first; None keeps each tensor's own.
      progress: True, False, or None for a bar on a terminal only.
      follow_links: as in `load_checkpoint`.

    Raises:
      CheckpointError: listing every fault of the source, or every weight that the group size does
        not divide; naming a tensor with values too large for `dtype`; or if the destination exists.
      InputError: if an argument is out of range, an entry of `ignore` names nothing, nothing would
        be quantized, or not all the experts that are one array.
    """
    dtype = read_dtype(dtype)
    _check_numbers(bits, group_size)
    plan = plan_original(resolve_folder(source), follow_links=follow_links)
    if plan.quantized:
        fault = Fault(
            f"{len(plan.quantized)} modules are quantized already", way_out="dequantize it first"
        )
        raise CheckpointError(plan.folder, [fault])
    tensors = {name: i for i in plan.plain.values() for name in name_separately(i.name)}
    matrices = {
        name: info
        for name, info in tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and info.dtype.name in SCALE_DTYPES
    }
    left_alone = _find_ignored(ignore, tensors)
    left_alone |= {name for name in matrices if _is_embedding(_name_module(name), plan.config)}
    linears = {name: info for name, info in matrices.items() if name not in left_alone}
    if not linears:
        raise InputError(
            f"{plan.folder}: no linear weight is left to quantize", ["loosen `ignore`"]
        )
    _check_experts(plan, linears)
    specs = _make_specs(plan, linears, bits, group_size, symmetric)
    kept = dict.fromkeys(_name_module(i.name) for n, i in matrices.items() if n not in linears)
    modules = [name for name in kept if "Embedding" not in name_classes(name)]
    if _HEAD not in modules and f"{_HEAD}.weight" not in tensors:
        modules.append(_HEAD)  # tied: a Linear to those who read the config, though without tensor
    config = drop_quantization(plan.config) | {
        "quantization_config": describe_quantization(bits, group_size, symmetric, modules)
    }
    _write(plan, destination, config, dtype, "quantizing", progress, specs)


def dequantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: Any = None,
    progress: bool | None = None,
    follow_links: bool = False,
) -> None:
    """Write a checkpoint's weights as floats, the same bits as compressed-tensors' `decompress`.

    Those of AutoAWQ and GPTQ are what these compute, `(u - z) * s` in the dtype of s.

    Args:
      source: a checkpoint that `load_checkpoint` reads.
      destination: the folder to make; it must not exist.
      dtype: float dtype that every float tensor is cast to at the end; None is the scales' dtype
        for the weights and its own for every other tensor.
      progress: True, False, or None for a bar on a terminal only.
      follow_links: as in `load_checkpoint`.

    Raises:
      CheckpointError: listing every fault of the source, bad scales included; naming a tensor with
        values too large for `dtype`; or if the destination exists.
      InputError: if nothing in it is quantized, or `dtype` is none of these.
    """
    dtype = read_dtype(dtype)
    plan = plan_original(resolve_folder(source), follow_links=follow_links)
    if not plan.quantized:
        raise InputError(f"{plan.folder}: no module is quantized")
    if faults := check_scales(plan):
        raise CheckpointError(plan.folder, faults)
    config = drop_quantization(plan.config)
    _write(plan, destination, config, dtype, "dequantizing", progress, {})


def _write(
    plan: Plan,
    destination: str | os.PathLike[str],
    config: dict[str, Any],
    dtype: np.dtype | None,
    verb: str,
    progress: bool | None,
    specs: dict[str, QuantSpec],
) -> None:
    if dtype is not None:
        for section in [config, *(config.get(name) for name in SUBCONFIGS)]:
            if isinstance(section, dict):
                stated = [key for key in ("dtype", "torch_dtype") if key in section]
                section |= dict.fromkeys(stated, dtype.name)
    with show_bytes(f"{verb} {plan.folder.name}", visible=progress) as report:

        def list_tensors() -> Iterator[tuple[str, np.ndarray]]:
            done = 0
            stacked: dict[str, np.ndarray] = {}
            for part in plan.list_parts():
                for name, array in _convert(part, dtype, specs):
                    if name_separately(name) == [name]:
                        yield name, array
                    else:
                        path = part.name if isinstance(part, TensorInfo) else part.path
                        experts = plan.stacks[plan.places[path]].experts
                        yield from _stack(name, array, experts, stacked)
                done += part.nbytes
                report(done, plan.nbytes, "")

        write_checkpoint(
            Path(destination),
            list_tensors(),
            config,
            beside=plan.folder,
            follow_links=plan.follow_links,
        )


def _convert(
    part: QuantizedModule | TensorInfo, dtype: Any, specs: dict[str, QuantSpec]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors to write for one part of the source."""
    if isinstance(part, QuantizedModule):
        yield from _dequantize(part, dtype)
        return
    array = _cast(read_tensor(part), dtype, part.file, part.name)
    names = name_separately(part.name)
    if not any(f"{_name_module(name)}.weight" in specs for name in names):
        yield part.name, array
        return
    for name, rows in zip(names, np.split(array, len(names)), strict=True):
        if name not in specs:
            yield name, rows
            continue
        spec, module = specs[name], _name_module(name)
        try:
            tensors = unpack(quantize(jnp.asarray(rows), spec, scale_dtype=rows.dtype), spec)
        except SpecError as error:
            fault = Fault(str(error), part.file.name, part.name)
            raise CheckpointError(part.file.parent, [fault]) from None
        for role, tensor in tensors.items():
            yield f"{module}.{role}", tensor


def _dequantize(part: QuantizedModule, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    arrays = dict(zip(part.tensors, read_tensors(part.tensors.values()), strict=True))
    bias = arrays.pop("bias", None)
    arrays.pop("weight_shape", None)  # the plan has read it; a stacked one is that of all experts
    names = f"{part.path}.weight", f"{part.path}.bias"
    if name_separately(part.path) != [part.path]:
        names = part.path, part.path.replace("[", "_bias[")
    weight = np.asarray(dequantize(pack(arrays, part.spec, part.encoding), part.spec))
    yield names[0], _cast(weight, dtype, part.tensors["weight_packed"].file, names[0])
    if bias is not None:
        yield names[1], _cast(bias, dtype, part.tensors["bias"].file, names[1])


def _stack(
    name: str, array: np.ndarray, experts: int, stacked: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Put "experts.down_proj[3]" into its array in `stacked`; gives that when it is complete."""
    whole, _, index = name.removesuffix("]").partition("[")
    if whole not in stacked:
        stacked[whole] = np.empty((experts, *array.shape), array.dtype)
    stacked[whole][int(index)] = array
    if int(index) == experts - 1:  # they follow each other in the files
        yield whole, stacked.pop(whole)


def _cast(array: np.ndarray, dtype: Any, file: Path, name: str) -> np.ndarray:
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if faults := check_cast(array, cast, file, name):
        raise CheckpointError(file.parent, faults)
    return cast


def _find_ignored(ignore: Iterable[str], tensors: Mapping[str, TensorInfo]) -> set[str]:
    """The names among the tensors' that entries of `ignore` name.

    Raises:
      InputError: listing the entries that are no patterns, or name nothing.
    """
    if isinstance(ignore, str):
        raise InputError(f"ignore: expected a list of modules, got the text {ignore!r}")
    paths = {name: {_name_module(name), _name_module(i.name)} for name, i in tensors.items()}
    found, reasons = set(), []
    for entry in ignore:
        try:
            matches = _compile(entry)
        except ValueError as error:
            reasons.append(f"{entry!r} {error}")
            continue
        named = {name for name, held in paths.items() if any(map(matches, held))}
        found |= named
        # the head may be tied, and so without a tensor
        if not named and entry not in DEFAULT_IGNORE and not matches(_HEAD):
            reasons.append(f"{entry!r} names no module: give its whole path, or re: and a pattern")
    if reasons:
        raise InputError("ignore: not all of it can be followed", reasons)
    return found


def _compile(entry: str) -> Callable[[str], Any]:
    """What is true of the paths that an entry of `ignore` names.

    Raises:
      ValueError: if its pattern is none.
    """
    if not entry.startswith("re:"):
        return entry.__eq__
    return compile_pattern(entry.removeprefix("re:")).match


def _is_embedding(path: str, config: Mapping[str, Any]) -> bool:
    """Whether rows are looked up in it, also if it is a product, as the head, elsewhere."""
    return are_tied(config) is True if path == _HEAD else "Embedding" in name_classes(path)


def _name_module(tensor: str) -> str:
    """The path that config.json would name; of a stacked tensor's expert that of the tensor."""
    if name_separately(tensor) != [tensor]:
        return tensor.partition("[")[0]
    return tensor.removesuffix(".weight").removesuffix(".bias")


def _check_experts(plan: Plan, linears: Collection[str]) -> None:
    """Refuse to quantize only some experts of a stack, which nobody could load."""
    reasons = []
    for path, stack in plan.stacks.items():
        names = [name for place in stack.places for name in name_separately(place)]
        weights = [name for name in names if name.endswith(".weight")]
        chosen = sum(name in linears for name in weights)
        if chosen not in (0, len(weights)):
            reasons.append(f"{path}: {chosen} of its {len(weights)} matrices")
    if reasons:
        summary = f"{plan.folder}: experts are quantized all or none: mend `ignore`, which leaves"
        raise InputError(summary, reasons)


def _check_numbers(bits: int, group_size: int) -> None:
    """Refuse what is wrong with every weight before they are looked at.

    Raises:
      InputError: naming the argument.
    """
    features = group_size if isinstance(group_size, int) and group_size > 0 else 1
    try:
        QuantSpec(
            bits=bits,
            group_size=group_size,
            symmetric=True,
            in_features=features,
            out_features=1,
        )
    except SpecError as error:
        raise InputError(str(error)) from None


def _make_specs(
    plan: Plan, linears: dict[str, TensorInfo], bits: int, group_size: int, symmetric: bool
) -> dict[str, QuantSpec]:
    specs, faults = {}, []
    for name, info in linears.items():
        n, k = info.shape
        try:
            specs[name] = QuantSpec(
                bits=bits,
                group_size=group_size,
                symmetric=symmetric,
                in_features=k,
                out_features=n // len(name_separately(info.name)),
            )
        except SpecError as error:
            faults.append(
                Fault(str(error), info.file.name, name, "choose another group size, or ignore it")
            )
    if faults:
        raise CheckpointError(plan.folder, faults)
    return specs


def describe_quantization(
    bits: int, group_size: int, symmetric: bool, ignore: list[str]
) -> dict[str, Any]:
    """The quantization_config as compressed-tensors writes it."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "version": FORMAT_VERSION,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
