"""Checkpoint folder -> checkpoint folder: `quantize_checkpoint` and `dequantize_checkpoint`.

Both go tensor by tensor; memory is one shard of the output.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxwna16.errors import InputError
from jaxwna16.progress import show_bytes
from loaders.errors import CheckpointError, Fault
from loaders.plan import Plan, QuantizedModule, make_plan
from loaders.repack import pack, unpack
from loaders.safetensors_file import TensorInfo, read_tensor
from loaders.stream import check_cast, check_scales
from loaders.write import write_checkpoint
from pallas_kernels.dequantize import dequantize
from pallas_kernels.errors import SpecError
from pallas_kernels.quantize import quantize
from pallas_kernels.spec import QuantSpec

DEFAULT_IGNORE = ("lm_head",)
# the compressed-tensors version whose format is written; 4 and 8 bits are the same in all of them
FORMAT_VERSION = "0.20.0"
_EMBEDDINGS = re.compile(r"(.*\.)?(embed_tokens|embed_positions|embeddings?|wte|wpe)")


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
) -> None:
    """Round the linear weights of a Hugging Face folder to the nearest integers.

    Writes a compressed-tensors `pack-quantized` checkpoint, which compressed-tensors, transformers
    and vLLM read. Linear weights are the 2-D tensors named `*.weight`, but for embeddings and what
    `ignore` names. Scales have the dtype of the weights.

    Args:
      source: folder with config.json and safetensors files that are not quantized.
      destination: the folder to make; it must not exist.
      bits: 4 or 8.
      group_size: input features that share a scale, or -1 for one scale per output channel.
      symmetric: without zero points, or with.
      ignore: modules to leave alone: exact paths, or `re:` and a pattern anchored at the start.
      dtype: float dtype the whole checkpoint is cast to first; None keeps each tensor's own.
      progress: True, False, or None for a bar on a terminal only.

    Raises:
      CheckpointError: listing every fault of the source, or every weight that the group size does
        not divide; naming a tensor with values too large for `dtype`; or if the destination exists.
      InputError: if nothing would be quantized.
    """
    plan = make_plan(Path(source))
    ignore = tuple(ignore)
    if plan.quantized:
        fault = Fault(
            f"{len(plan.quantized)} modules are quantized already", way_out="dequantize it first"
        )
        raise CheckpointError(plan.folder, [fault])
    linears = {i.name: i for i in plan.plain.values() if _is_linear(i, ignore)}
    if not linears:
        raise InputError(
            f"{plan.folder}: no linear weight is left to quantize", ["loosen `ignore`"]
        )
    specs = _make_specs(plan, linears, bits, group_size, symmetric)
    kept = [
        i.name.removesuffix(".weight")
        for i in plan.plain.values()
        if _is_matrix(i) and i.name not in linears
    ]
    modules = [name for name in kept if not _EMBEDDINGS.fullmatch(name)]
    if plan.config.get("tie_word_embeddings") and "lm_head" not in modules:
        modules.append("lm_head")  # a Linear to those who read the config, though it has no tensor
    config = dict(plan.config) | {
        "quantization_config": describe_quantization(bits, group_size, symmetric, modules)
    }
    _write(plan, destination, config, dtype, "quantizing", progress, specs)


def dequantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: Any = None,
    progress: bool | None = None,
) -> None:
    """Write a checkpoint's weights as floats, the same bits as compressed-tensors' `decompress`.

    Args:
      source: a pack-quantized checkpoint.
      destination: the folder to make; it must not exist.
      dtype: float dtype that every float tensor is cast to at the end; None is the scales' dtype
        for the weights and its own for every other tensor.
      progress: True, False, or None for a bar on a terminal only.

    Raises:
      CheckpointError: listing every fault of the source, bad scales included; naming a tensor with
        values too large for `dtype`; or if the destination exists.
      InputError: if nothing in it is quantized.
    """
    plan = make_plan(Path(source))
    if not plan.quantized:
        raise InputError(f"{plan.folder}: no module is quantized")
    if faults := check_scales(plan):
        raise CheckpointError(plan.folder, faults)
    dropped = ("quantization_config", "compression_config")
    config = {key: value for key, value in plan.config.items() if key not in dropped}
    _write(plan, destination, config, dtype, "dequantizing", progress, {})


def _write(
    plan: Plan,
    destination: str | os.PathLike[str],
    config: dict[str, Any],
    dtype: Any,
    verb: str,
    progress: bool | None,
    specs: dict[str, QuantSpec],
) -> None:
    if dtype is not None:
        config |= {key: jnp.dtype(dtype).name for key in ("dtype", "torch_dtype") if key in config}
    with show_bytes(f"{verb} {plan.folder.name}", visible=progress) as report:

        def list_tensors() -> Iterator[tuple[str, np.ndarray]]:
            done = 0
            for part in plan.list_parts():
                yield from _convert(part, dtype, specs)
                done += part.nbytes
                report(done, plan.nbytes, "")

        write_checkpoint(Path(destination), list_tensors(), config, beside=plan.folder)


def _convert(
    part: QuantizedModule | TensorInfo, dtype: Any, specs: dict[str, QuantSpec]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors to write for one part of the source."""
    if isinstance(part, QuantizedModule):
        arrays = {role: read_tensor(info) for role, info in part.tensors.items()}
        bias = arrays.pop("bias", None)
        name, file = f"{part.path}.weight", part.tensors["weight_packed"].file
        weight = np.asarray(dequantize(pack(arrays, part.spec), part.spec))
        yield name, _cast(weight, dtype, file, name)
        if bias is not None:
            name, file = f"{part.path}.bias", part.tensors["bias"].file
            yield name, _cast(bias, dtype, file, name)
        return
    array = _cast(read_tensor(part), dtype, part.file, part.name)
    if part.name not in specs:
        yield part.name, array
        return
    spec, module = specs[part.name], part.name.removesuffix(".weight")
    try:
        tensors = unpack(quantize(jnp.asarray(array), spec, scale_dtype=array.dtype), spec)
    except SpecError as error:
        raise CheckpointError(
            part.file.parent, [Fault(str(error), part.file.name, part.name)]
        ) from None
    for name, tensor in tensors.items():
        yield f"{module}.{name}", tensor


def _cast(array: np.ndarray, dtype: Any, file: Path, name: str) -> np.ndarray:
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if faults := check_cast(array, cast, file, name):
        raise CheckpointError(file.parent, faults)
    return cast


def _is_matrix(info: TensorInfo) -> bool:
    return info.name.endswith(".weight") and len(info.shape) == 2 and info.dtype.name in _FLOATS


_FLOATS = ("float16", "bfloat16", "float32")


def _is_linear(info: TensorInfo, ignore: tuple[str, ...]) -> bool:
    module = info.name.removesuffix(".weight")
    ignored = any(
        re.match(i.removeprefix("re:"), module) if i.startswith("re:") else i == module
        for i in ignore
    )
    return _is_matrix(info) and not ignored and not _EMBEDDINGS.fullmatch(module)


def _make_specs(
    plan: Plan, linears: dict[str, TensorInfo], bits: int, group_size: int, symmetric: bool
) -> dict[str, QuantSpec]:
    specs, faults = {}, []
    for name, info in linears.items():
        n, k = info.shape
        try:
            specs[name] = QuantSpec(
                bits=bits, group_size=group_size, symmetric=symmetric, in_features=k, out_features=n
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
