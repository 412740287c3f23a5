"""Checkpoint folder -> checkpoint folder whose weights are floats: `dequantize_checkpoint`.

Experts stay as they are: stacked ones are stacked again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxwna16.checkpoints.load import resolve_folder
from jaxwna16.checkpoints.write_anew import cast_tensor, write_anew
from jaxwna16.dtypes import read_dtype
from jaxwna16.errors import InputError
from jaxwna16.programs import refuse_fork
from loaders.errors import CheckpointError
from loaders.files.safetensors_file import TensorInfo, read_tensor, read_tensors
from loaders.files.stamps import take_stamps
from loaders.modules.experts import name_separately
from loaders.modules.modules import QuantizedModule
from loaders.modules.repack import pack
from loaders.open import plan_original
from loaders.schemes.quantization_config import drop_quantization
from loaders.stream import check_scales
from pallas_kernels.format.dequantize import dequantize


def dequantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: Any = None,
    progress: bool | None = None,
    follow_links: bool = False,
) -> None:
    """Write a checkpoint's weights as floats, the same bits as compressed-tensors' `decompress`.

    For AutoAWQ and GPTQ they are what these tools compute, `(u - z) * s` in the dtype of s.

    Args:
      source: a checkpoint that `load_checkpoint` reads.
      destination: the folder to make; it must not exist.
      dtype: float dtype that every float tensor is cast to at the end; None is the scales' dtype
        for the weights and its own forevery other tensor.
      progress: True, False, or None for a bar on a terminal only.
      follow_links: as in `load_checkpoint`.

    Raises:
      CheckpointError: listing every fault of the source, bad scales included; naming a tensor with
        values too large for `dtype`; or if the destination exists, or the source changes meanwhile.
      InputError: if nothing in it is quantized, or `dtype` is not such a dtype.

    Example:
      ```python
      jaxwna16.dequantize_checkpoint("path/to/checkpoint", "path/to/dequantized")
      checkpoint = jaxwna16.load_checkpoint("path/to/dequantized")
      assert not checkpoint.specs
      ```
    """
    dtype = read_dtype(dtype)
    refuse_fork(loads=True)
    source = resolve_folder(source)
    before = take_stamps(source)
    plan = plan_original(source, follow_links=follow_links)
    if not plan.quantized:
        raise InputError(f"{plan.folder}: no module is quantized")
    if faults := check_scales(plan):
        raise CheckpointError(plan.folder, faults)
    config = drop_quantization(plan.config)
    write_anew(
        plan,
        destination,
        config,
        lambda part: _dequantize(part, dtype),
        before=before,
        dtype=dtype,
        verb="dequantizing",
        progress=progress,
    )


def _dequantize(part: QuantizedModule | TensorInfo, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors to write for one part of the source."""
    if isinstance(part, TensorInfo):
        yield part.name, cast_tensor(read_tensor(part), dtype, part.file, part.name)
        return
    arrays = dict(zip(part.tensors, read_tensors(part.tensors.values()), strict=True))
    bias = arrays.pop("bias", None)
    arrays.pop("weight_shape", None)  # the plan has read it; a stacked one is that of all experts
    names = f"{part.path}.weight", f"{part.path}.bias"
    if name_separately(part.path) != [part.path]:
        names = part.path, part.path.replace("[", "_bias[")
    weight = np.asarray(dequantize(pack(arrays, part.spec, part.encoding), part.spec))
    yield names[0], cast_tensor(weight, dtype, part.tensors["weight_packed"].file, names[0])
    if bias is not None:
        yield names[1], cast_tensor(bias, dtype, part.tensors["bias"].file, names[1])
