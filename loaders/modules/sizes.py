"""N and K of packed modules: what their `weight_shape` holds, or what the other headers tell."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from loaders.files.safetensors_file import TensorInfo, read_tensors
from loaders.modules.experts import are_stacked
from loaders.schemes.config_groups import Scheme

_MAX_SHAPE_BYTES = 1 << 16  # [E, 4] int64 for 2048 experts


def find_sizes(
    modules: Mapping[str, Mapping[str, TensorInfo]],
    schemes: Mapping[str, Scheme | None],
    *,
    headers_only: bool,
    unsound: Collection[str],
) -> dict[str, np.ndarray]:
    """What the `weight_shape` of each module holds.

    Args:
      modules: the tensors of each module by role.
      schemes: the modules that are asked for, with their schemes.
      headers_only: leave unread what the shapes of the other tensors tell.
      unsound: names of files of which nothing but the header is to be read.

    Returns:
      Sizes by path, except for modules whose `weight_shape` is missing, or too large to be one. If
      neither the file nor the headers tell K, it is the largest that the words can hold.
    """
    told: dict[str, np.ndarray] = {}
    asked: dict[str, TensorInfo] = {}
    for path, scheme in schemes.items():
        found = modules[path]
        info = found.get("weight_shape")
        if info is None or scheme is None or info.nbytes > _MAX_SHAPE_BYTES:
            continue
        readable = info.file.name not in unsound
        if readable and not headers_only:
            asked[path] = info
        elif found.keys() >= {"weight_packed", "weight_scale"}:
            told[path], certain = _derive(path, found, scheme)
            if readable and not certain:
                asked[path] = info
    read = dict(zip(asked, read_tensors(asked.values()), strict=True))
    # zeros are what is read from a hole in a sparse file
    return told | {p: sizes for p, sizes in read.items() if p not in told or sizes.any()}


def _derive(path: str, found: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[np.ndarray, bool]:
    """What `weight_shape` should hold, and whether the headers allow no other K."""
    words, scale = found["weight_packed"].shape, found["weight_scale"].shape
    groups = scale[-1] if scale else 0
    certain = scheme.group_size > 0 and groups > 1
    n, columns = words[-2:] if len(words) > 1 else (0, 0)
    k = groups * scheme.group_size if certain else columns * 32 // scheme.bits
    if not are_stacked(path, found):
        return np.array([n, k]), certain
    experts, shape = found["weight_packed"].shape[0], found["weight_shape"].shape
    if shape in ((experts, 2), (experts, 4)):
        return np.tile([n, k], (experts, 1)), certain
    return np.array([experts, n, k]), certain
