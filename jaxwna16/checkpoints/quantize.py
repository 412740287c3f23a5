"""Checkpoint folder -> checkpoint folder whose linear weights are packed: `quantize_checkpoint`.

Experts that are quantized become separate ones (`experts.3.gate_proj`), as compressed-tensors and
vLLM have them. All others stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxwna16.checkpoints.left_alone import HEAD, find_left_alone, list_ignored, name_module
from jaxwna16.checkpoints.load import resolve_folder
from jaxwna16.checkpoints.quantize_plan import (
    check_experts,
    check_model,
    check_numbers,
    describe_quantization,
    make_specs,
)
from jaxwna16.checkpoints.write_anew import cast_tensor, write_anew
from jaxwna16.dtypes import read_dtype
from jaxwna16.errors import InputError
from jaxwna16.programs import refuse_fork
from loaders.errors import CheckpointError, Fault
from loaders.files.safetensors_file import TensorInfo, read_tensor
from loaders.files.stamps import take_stamps
from loaders.modules.experts import name_separately
from loaders.modules.repack import unpack
from loaders.open import plan_original
from loaders.schemes.quantization_config import drop_quantization
from pallas_kernels.errors import SpecError
from pallas_kernels.format.quantize import quantize
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import SCALE_DTYPES


def quantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    ignore: Iterable[str] = (),
    ignore_only: Iterable[str] | None = None,
    dtype: Any = None,
    progress: bool | None = None,
    follow_links: bool = False,
) -> None:
    """Round the linear weights of a Hugging Face folder to the nearest integers.

    Writes a compressed-tensors `pack-quantized` checkpoint, which compressed-tensors, transformers
    and vLLM read. Linear weights are the 2-D tensors named `*.weight` and stacked experts, except
    embeddings, a head tied to one, and weights that are left alone. By default these are
    (`jaxwna16.checkpoints.left_alone`): heads, routers, the gates of shared experts and of delta
    nets, towers for images and sound with their projectors, and layers that predict several tokens
    at once. Scales have the dtype of the weights.

    Args:
      source: folder with config.json and safetensors files that are not quantized.
      destination: the folder to make; it must not exist.
      bits: 4 or 8.
      group_size: input features that share a scale, or -1 for one scale per output channel.
      symmetric: without zero points, or with.
      ignore: modules to leave alone beside those: exact paths, or `re:` and a pattern anchored at
        the start.
      ignore_only: the same in place of those; () leaves nothing else alone.
      dtype: float dtype the whole checkpoint is cast to first; None keeps each tensor's own.
      progress: True, False, or None for a bar on a terminal only.
      follow_links: as in `load_checkpoint`.

    Raises:
      CheckpointError: listing every fault of the source, or every weight that the group size does
        not divide; naming a tensor with values too large for `dtype`; or if the destination exists,
        or the source changes meanwhile.
      InputError: if an argument is out of range, an entry of `ignore` names nothing, nothing would
        be quantized, or only some experts of one array; or if `load_model` can load the source, but
        could not load the result.

    Example:
      ```python
      jaxwna16.quantize_checkpoint(
          "path/to/floats", "path/to/quantized", bits=4, group_size=32, symmetric=False
      )
      checkpoint = jaxwna16.load_checkpoint("path/to/quantized")
      ```
    """
    dtype = read_dtype(dtype)
    check_numbers(bits, group_size)
    refuse_fork(loads=True)
    source = resolve_folder(source)
    before = take_stamps(source)
    plan = plan_original(source, follow_links=follow_links)
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
    left_alone, entries = find_left_alone(
        tensors, plan.config, ignore=ignore, ignore_only=ignore_only
    )
    linears = {name: info for name, info in matrices.items() if name not in left_alone}
    if not linears:
        raise InputError(
            f"{plan.folder}: no linear weight is left to quantize", ["loosen `ignore`"]
        )
    check_experts(plan, linears)
    specs = make_specs(plan, linears, bits, group_size, symmetric)
    check_model(plan, specs)
    kept = [name_module(info.name) for name, info in matrices.items() if name not in linears]
    ignored = list_ignored(entries, kept)
    if HEAD not in ignored and f"{HEAD}.weight" not in tensors:
        ignored.append(HEAD)  # tied: a Linear to those who read the config, though without tensor
    config = drop_quantization(plan.config) | {
        "quantization_config": describe_quantization(bits, group_size, symmetric, ignored)
    }
    write_anew(
        plan,
        destination,
        config,
        lambda part: _quantize(part, dtype, specs),
        before=before,
        dtype=dtype,
        verb="quantizing",
        progress=progress,
    )


def _quantize(
    part: TensorInfo, dtype: Any, specs: dict[str, QuantSpec]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors to write for one of the source."""
    array = cast_tensor(read_tensor(part), dtype, part.file, part.name)
    names = name_separately(part.name)
    if not any(f"{name_module(name)}.weight" in specs for name in names):
        yield part.name, array
        return
    for name, rows in zip(names, np.split(array, len(names)), strict=True):
        if name not in specs:
            yield name, rows
            continue
        spec, module = specs[name], name_module(name)
        try:
            tensors = unpack(quantize(jnp.asarray(rows), spec, scale_dtype=rows.dtype), spec)
        except SpecError as error:
            fault = Fault(str(error), part.file.name, part.name)
            raise CheckpointError(part.file.parent, [fault]) from None
        for role, tensor in tensors.items():
            yield f"{module}.{role}", tensor
