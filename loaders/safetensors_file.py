"""Reading a safetensors file: the header, checked, and single tensors, without a memory map.

Format (huggingface/safetensors, README): 8 bytes little-endian header length, a JSON object
{name: {"dtype", "shape", "data_offsets"}}, then the tensors' bytes without holes. Tensors are read
with ordinary reads into buffers of their own, so a file that shrinks after it was opened is an
error here and not a crash of the process, and memory in use is what was asked for.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from loaders.errors import CheckpointError, Fault

MAX_HEADER_BYTES = 100_000_000
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_MAX_DIMENSIONS = 32  # NumPy's limit before version 2
_ALIGNMENT = 64  # what XLA needs to take a host buffer without copying it


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes from byte `start` of `file` on."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def split(self) -> list[TensorInfo]:
        """The tensors along the first axis, "name[0]", "name[1]", …: each lies in one piece."""
        count, *rest = self.shape
        shape = tuple(rest)
        size = math.prod(shape) * self.dtype.itemsize
        return [
            TensorInfo(f"{self.name}[{i}]", self.file, self.dtype, shape, self.start + i * size)
            for i in range(count)
        ]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one file; no tensor is read.

    Raises:
      CheckpointError: if the file is not a whole, well-formed safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
                raise _error(
                    path,
                    f"the header claims {length} bytes, the file has {size}",
                    way_out="the file is truncated or not safetensors: download it again",
                )
            text = file.read(length)
        entries = json.loads(text, object_pairs_hook=refuse_duplicates)
        if not isinstance(entries, dict):
            raise ValueError("it is not an object")
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}") from None
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise _error(path, f"the header is not valid JSON: {error}") from None
    entries.pop("__metadata__", None)
    infos, faults = {}, []
    for name, entry in entries.items():
        try:
            infos[name] = _parse_entry(name, entry, path, 8 + length)
        except ValueError as error:
            faults.append(Fault(str(error), path.name, name))
    if not faults:
        faults = _find_gaps(path, list(infos.values()), 8 + length, size)
    if faults:
        raise CheckpointError(path.parent, faults)
    return infos


def read_tensor(info: TensorInfo) -> np.ndarray:
    """Read one tensor into a new array.

    Raises:
      CheckpointError: if the file ends before the tensor does.
    """
    return read_tensors([info])[0]


def read_tensors(infos: Iterable[TensorInfo]) -> list[np.ndarray]:
    """Read tensors into new arrays, in the order given; each file is opened once.

    Raises:
      CheckpointError: if a file ends before one of its tensors does.
    """
    by_file: dict[Path, list[tuple[int, TensorInfo]]] = defaultdict(list)
    for i, info in enumerate(infos):
        by_file[info.file].append((i, info))
    arrays: dict[int, np.ndarray] = {}
    for path, found in by_file.items():
        try:
            with path.open("rb", buffering=0) as file:
                for i, info in sorted(found, key=lambda pair: pair[1].start):
                    arrays[i] = _read(file, info)
        except OSError as error:
            name = found[0][1].name if len(found) == 1 else ""
            raise _error(path, f"cannot be read: {error.strerror}", name) from None
    return [arrays[i] for i in range(len(arrays))]


def _read(file: io.FileIO, info: TensorInfo) -> np.ndarray:
    raw = np.empty(info.nbytes + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    buffer = raw[first : first + info.nbytes]
    file.seek(info.start)
    view, done = buffer.data, 0
    while done < info.nbytes and (count := file.readinto(view[done:])):
        done += count
    if done < info.nbytes:
        raise _error(
            info.file, f"expected {info.nbytes} bytes, the file ended after {done}", info.name
        )
    return buffer.view(info.dtype).reshape(info.shape)


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object as json's `object_pairs_hook`, which by itself keeps the last of a key.

    Raises:
      ValueError: naming every key that stands twice.
    """
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = sorted(name for name, count in counts.items() if count > 1)
        raise ValueError(f"keys that stand twice: {', '.join(twice)}")
    return table


def _parse_entry(name: str, entry: object, path: Path, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError("the header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"shape {shape!r} or data_offsets {offsets!r} are not lists of sizes")
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) >= 2**59:
        raise ValueError(f"shape {shape} is too large for any array")
    info = TensorInfo(name, path, DTYPES[dtype], tuple(shape), data_start + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        raise ValueError(
            f"{dtype} {shape} takes {info.nbytes} bytes, data_offsets {offsets} hold "
            f"{offsets[1] - offsets[0]}"
        )
    return info


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in values
    )


def _find_gaps(path: Path, infos: list[TensorInfo], data_start: int, size: int) -> list[Fault]:
    """Tensors must follow each other from the header's end to the file's end."""
    position, faults = data_start, []
    for info in sorted(infos, key=lambda info: (info.start, info.nbytes)):
        if info.start != position:
            kind = (
                "overlaps the tensor before it"
                if info.start < position
                else "leaves a hole before it"
            )
            what = f"{kind}: starts at byte {info.start}, expected {position}"
            faults.append(Fault(what, path.name, info.name))
        position = max(position, info.start + info.nbytes)
        if position > size:
            what = f"ends at byte {position}, the file has {size}"
            way_out = "the file is truncated: download it again"
            return [*faults, Fault(what, path.name, info.name, way_out)]
    if position < size:
        faults.append(Fault(f"{size - position} bytes at the end belong to no tensor", path.name))
    return faults


def _error(path: Path, what: str, tensor: str = "", way_out: str = "") -> CheckpointError:
    return CheckpointError(path.parent, [Fault(what, path.name, tensor, way_out)])
