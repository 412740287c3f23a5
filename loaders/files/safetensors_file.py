"""Reading a safetensors file: the header, checked, and single tensors, without a memory map.

Format (huggingface/safetensors, README): 8 bytes little-endian header length, a JSON object
{name: {"dtype", "shape", "data_offsets"}}, then the tensors' bytes without holes. Tensors are read
with ordinary reads into buffers of their own, so a file that shrinks after it was opened is an
error here and not a crash of the process, and memory in use is what was asked for.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as show
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from loaders.errors import CheckpointError, Fault
from loaders.files.host_memory import make_zeros
from loaders.files.stamps import Stamp, make_stamp

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
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_NAMES = {dtype: dtype.name for dtype in DTYPES.values()}
_MAX_DIMENSIONS = 32  # NumPy's limit before version 2
_AGAIN = "download it again, or save the model again"
_MAX_NAME = 500  # each dot in it is a level of the params tree


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes from byte `start` of `file` on.

    Attributes:
      stamp: of the file when its header was read; None is not compared when the tensor is read.
    """

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stamp: Stamp | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """As `dtype.name`, which NumPy puts together anew each time."""
        return _NAMES[self.dtype]

    def split(self) -> list[TensorInfo]:
        """The tensors along the first axis, "name[0]", "name[1]", …: each lies in one piece."""
        count, *rest = self.shape
        shape = tuple(rest)
        size = math.prod(shape) * self.dtype.itemsize
        names = [f"{self.name}[{i}]" for i in range(count)]
        return [
            TensorInfo(name, self.file, self.dtype, shape, self.start + i * size, self.stamp)
            for i, name in enumerate(names)
        ]


def open_file(path: Path) -> io.FileIO:
    """Open a regular file; a pipe or a device, which could block forever, is never read.

    Raises:
      OSError: if there is no file that can be read.
    """
    file = io.FileIO(path, opener=_open_at_once)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one file; no tensor is read.

    Raises:
      CheckpointError: if the file is not a whole, well-formed safetensors file.
    """
    infos, faults = scan_header(path)
    if faults:
        raise CheckpointError(path.parent, faults)
    return infos


def scan_header(path: Path) -> tuple[dict[str, TensorInfo], list[Fault]]:
    """Read as much of a header as can be read; no tensor is read.

    Returns:
      The tensors that it describes, and what is wrong with them or with the size of the file: with
      a fault, nothing else of the file should be read.

    Raises:
      CheckpointError: if there is no header.
    """
    try:
        with io.BufferedReader(open_file(path)) as file:
            stamp = make_stamp(os.fstat(file.fileno()))
            size = stamp[0]
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
                raise _error(
                    path,
                    f"the header claims {length} bytes, the file has {size}",
                    way_out="the file is truncated or not safetensors: download it again",
                )
            entries = _parse_header(file.read(length))
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}") from None
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise _error(path, f"the header is not valid JSON: {error}") from None
    infos, faults = {}, []
    for name, entry in entries.items():
        try:
            infos[name] = _parse_entry(name, entry, path, 8 + length, stamp)
        except ValueError as error:
            faults.append(Fault(str(error), path.name, name[:_MAX_NAME], _AGAIN))
    return infos, faults or _find_gaps(path, list(infos.values()), 8 + length, size)


def _parse_header(text: bytes) -> dict[str, Any]:
    """The entries of a header; as strict as the safetensors library, and more with duplicates.

    Raises:
      ValueError: saying what is wrong.
    """
    if not text.startswith(b"{"):
        raise ValueError("it does not begin with {")
    hooks: dict[str, Any] = {"object_pairs_hook": refuse_duplicates, "parse_constant": _refuse}
    entries = json.loads(text.decode("utf-8"), **hooks)
    for name in entries:
        name.encode("utf-8")  # half of a surrogate pair is no name
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ must map names to texts")
    return entries


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def read_tensor(info: TensorInfo) -> np.ndarray:
    """Read one tensor into a new array.

    Raises:
      CheckpointError: if the file has changed since its header was read, or ends before the tensor.
    """
    return read_tensors([info])[0]


def read_tensors(infos: Iterable[TensorInfo]) -> list[np.ndarray]:
    """Read tensors into new arrays, in the order given; each file is opened once.

    Raises:
      CheckpointError: if a file has changed since its header was read, or ends before one of its
        tensors does.
    """
    by_file: dict[Path, list[tuple[int, TensorInfo]]] = defaultdict(list)
    for i, info in enumerate(infos):
        by_file[info.file].append((i, info))
    arrays: dict[int, np.ndarray] = {}
    for path, found in by_file.items():
        try:
            with open_file(path) as file:
                for i, info in sorted(found, key=lambda pair: pair[1].start):
                    arrays[i] = _read(file, info)
                _check_stamp(file, found[0][1])
        except OSError as error:
            name = found[0][1].name if len(found) == 1 else ""
            raise _error(path, f"cannot be read: {error.strerror}", name) from None
    return [arrays[i] for i in range(len(arrays))]


def _check_stamp(file: io.FileIO, info: TensorInfo) -> None:
    """Refuse a file that is not what its header was read from."""
    if info.stamp is not None and make_stamp(os.fstat(file.fileno())) != info.stamp:
        raise _error(info.file, "changed after its header was read", way_out="load it again")


def _read(file: io.FileIO, info: TensorInfo) -> np.ndarray:
    try:
        buffer = make_zeros((info.nbytes,), np.uint8)
    except MemoryError:
        what, way_out = f"there is no memory for its {info.nbytes} bytes", "free some"
        raise _error(info.file, what, info.name, way_out) from None
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
      ValueError: naming the duplicate keys.
    """
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = sorted(name for name, count in counts.items() if count > 1)
        more = f" and {len(twice) - 8} more" if len(twice) > 8 else ""
        raise ValueError(f"duplicate keys: {', '.join(twice[:8])}{more}")
    return table


def _parse_entry(name: str, entry: Any, path: Path, data_start: int, stamp: Stamp) -> TensorInfo:
    if len(name) > _MAX_NAME:
        raise ValueError(f"the name is longer than {_MAX_NAME} characters")
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError):
        raise ValueError("the header entry lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"unknown dtype {show(dtype)}")
    if not _are_sizes(shape):
        raise ValueError(f"shape {show(shape)} is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets {show(offsets)} are not a start and an end")
    if len(shape) > _MAX_DIMENSIONS or math.prod(filter(None, shape)) >= 2**59:
        raise ValueError(f"shape {show(shape)} is too large for any array")
    known = DTYPES[dtype]
    first, end = offsets
    nbytes = math.prod(shape) * known.itemsize
    if end - first != nbytes:
        raise ValueError(
            f"{dtype} {shape} takes {nbytes} bytes, data_offsets {offsets} hold {end - first}"
        )
    return TensorInfo(name, path, known, tuple(shape), data_start + first, stamp)


def _are_sizes(values: object) -> bool:
    if not isinstance(values, list):
        return False
    for value in values:  # a loop, as files have a hundred thousand of these lists
        if type(value) is not int or not 0 <= value < 2**63:
            return False
    return True


def _find_gaps(path: Path, infos: list[TensorInfo], data_start: int, size: int) -> list[Fault]:
    """Tensors must follow each other from the header's end to the file's end."""
    position, faults = data_start, []
    for start, end, name in sorted((i.start, i.start + i.nbytes, i.name) for i in infos):
        if start != position:
            kind = "overlaps the tensor" if start < position else "leaves a hole"
            what = f"{kind} before it: starts at byte {start}, expected {position}"
            faults.append(Fault(what, path.name, name, _AGAIN))
        position = max(position, end)
        if position > size:
            what = f"ends at byte {position}, the file has {size}"
            way_out = "the file is truncated: download it again"
            return [*faults, Fault(what, path.name, name, way_out)]
    if position < size:
        what = f"{size - position} bytes at the end belong to no tensor"
        faults.append(Fault(what, path.name, "", _AGAIN))
    return faults


def _error(path: Path, what: str, tensor: str = "", way_out: str = _AGAIN) -> CheckpointError:
    return CheckpointError(path.parent, [Fault(what, path.name, tensor, way_out)])
