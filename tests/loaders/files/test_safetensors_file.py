"""Reading one safetensors file: whole ones exactly, broken ones with the place and the reason."""

from __future__ import annotations

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from loaders.errors import CheckpointError
from loaders.files.safetensors_file import (
    MAX_HEADER_BYTES,
    read_header,
    read_tensor,
    read_tensors,
)
from tests.folders import describe_entry as entry
from tests.folders import write_raw


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64]
    dtypes += [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
    dtypes += [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu]
    arrays = {np.dtype(t).name: rng.bytes(6 * np.dtype(t).itemsize) for t in dtypes}
    arrays = {
        name: np.frombuffer(raw, np.dtype(name)).reshape(2, 3) for name, raw in arrays.items()
    }
    arrays |= {"bool": np.array([True, False]), "scalar": np.array(2.5, np.float32)}
    arrays |= {"empty": np.zeros((0, 4), np.float32), "": np.ones(1, np.int8)}
    save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "pt"})
    infos = read_header(tmp_path / "a.safetensors")
    assert infos.keys() == arrays.keys()
    for name, array in arrays.items():
        found = read_tensor(infos[name])
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
        assert infos[name].nbytes == array.nbytes
        assert not found.size or found.ctypes.data % 64 == 0


@pytest.mark.parametrize(
    ("header", "data", "expected"),
    [
        (
            {"a": entry("F32", [2], 8, 0)},
            8,
            "a: F32 [2] takes 8 bytes, data_offsets [8, 0] hold -8",
        ),
        ({"a": entry("F32", [2], -8, 0)}, 8, "a: data_offsets [-8, 0] are not a start and an end"),
        ({"a": entry("F32", [2], 0, 8, 9)}, 8, "data_offsets [0, 8, 9] are not a start"),
        ({"a": entry("F32", [2], 0, "8")}, 8, "data_offsets [0, '8'] are not a start"),
        ({"a": entry("F32", [2], 0, True)}, 8, "data_offsets [0, True] are not a start"),
        (
            {"a": entry("F32", [2], 0, 12)},
            12,
            "a: F32 [2] takes 8 bytes, data_offsets [0, 12] hold 12",
        ),
        ({"a": entry("F32", [-2], 0, 8)}, 8, "a: shape [-2] is not a list of sizes"),
        ({"a": entry("F32", 2, 0, 8)}, 8, "a: shape 2 is not a list of sizes"),
        ({"a": entry("F32", [2.0], 0, 8)}, 8, "a: shape [2.0] is not a list"),
        ({"a": entry("F32", [2**64], 0, 8)}, 8, "is not a list of sizes"),
        ({"a": entry("F32", [2**40, 2**40, 0], 0, 0)}, 0, "is too large for any array"),
        ({"a": entry("U8", [1] * 65, 0, 1)}, 1, "is too large for any array"),
        ({"a": entry("F4", [2], 0, 1)}, 1, "a: unknown dtype 'F4'"),
        ({"a": entry(["F32"], [2], 0, 8)}, 8, "a: unknown dtype ['F32']"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "a: the header entry lacks dtype, shape or"),
        ({"a": [1]}, 8, "a: the header entry lacks dtype, shape or data_offsets"),
        ([1], 8, "the header is not valid JSON: it does not begin with {"),
        (b"{", 8, "the header is not valid JSON"),
        (b"\xff\xfe{", 8, "the header is not valid JSON"),
        (b'{"a": ' + b"[" * 200_000, 0, "the header is not valid JSON"),
        (b'{"a": {"shape": [' + b"9" * 5000 + b"]}}", 0, "the header is not valid JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', 0, "the header is not valid JSON: duplicate keys: a"),
        ({"a": entry("U8", [4], 2, 6)}, 6, "a: leaves a hole before it: starts at byte"),
        (
            {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 3, 7)},
            7,
            "b: overlaps the tensor before",
        ),
        (
            {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)},
            4,
            "b: overlaps the tensor before",
        ),
        ({"a": entry("U8", [4], 0, 4)}, 3, "a: ends at byte"),
        (
            {"a": entry("U8", [4], 0, 4)},
            6,
            "broken.safetensors: 2 bytes at the end belong to no tensor",
        ),
        ({}, 6, "broken.safetensors: 6 bytes at the end belong to no tensor"),
    ],
)
def test_broken_header_is_refused_with_the_file_the_tensor_and_the_reason(
    tmp_path, header, data, expected
):
    path = write_raw(tmp_path / "broken.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError, match=re.escape(expected)) as caught:
        read_header(path)
    assert all(fault.file == "broken.safetensors" for fault in caught.value.faults)
    assert str(caught.value).startswith(f"{tmp_path}: 1 fault")


def test_a_duplicate_inside_an_entry_is_refused_too(tmp_path):
    text = json.dumps(entry("U8", [1], 0, 1))[:-1] + ', "dtype": "I8"}'
    path = write_raw(tmp_path / "a.safetensors", f'{{"a": {text}}}'.encode(), bytes(1))
    with pytest.raises(CheckpointError, match="duplicate keys: dtype"):
        read_header(path)


@pytest.mark.parametrize("length", [99, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path, length):
    path = write_raw(tmp_path / "a.safetensors", {"a": 1}, length=length)
    size = path.stat().st_size
    with pytest.raises(
        CheckpointError, match=f"claims {length} bytes, the file has {size} .*again"
    ):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"version https://git-lfs\n"])
def test_file_that_is_no_safetensors_is_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors: the header claims .* truncated or not"
    ):
        read_header(tmp_path / "a.safetensors")


def test_file_that_is_missing_is_an_error_of_ours(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be read: No such file"):
        read_header(tmp_path / "a.safetensors")


def test_every_faulty_entry_is_listed(tmp_path):
    header = {
        "a": entry("F4", [2], 0, 1),
        "good": entry("U8", [1], 1, 2),
        "b": entry("F32", [-2], 2, 10),
        "c": 7,
    }
    path = write_raw(tmp_path / "a.safetensors", header, bytes(10))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert [fault.tensor for fault in caught.value.faults] == ["a", "b", "c"]
    assert "3 faults" in str(caught.value)


def test_every_hole_and_overlap_is_listed(tmp_path):
    header = {
        "a": entry("U8", [4], 2, 6),
        "b": entry("U8", [4], 4, 8),
        "inside b": entry("U8", [2], 5, 7),
        "c": entry("U8", [4], 9, 13),
    }
    path = write_raw(tmp_path / "a.safetensors", header, bytes(13))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    kinds = [(fault.tensor, fault.what.split()[0]) for fault in caught.value.faults]
    assert kinds == [
        ("a", "leaves"),
        ("b", "overlaps"),
        ("inside b", "overlaps"),
        ("c", "leaves"),
    ]
    assert caught.value.faults[-1].what.endswith(f"expected {_data_start(path) + 8}")


def test_file_cut_short_after_its_header_was_read_is_an_error_when_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.zeros(10, np.float32), "b": np.zeros(1, np.float32)}, path)
    infos = read_header(path)
    with path.open("r+b") as file:
        file.truncate(infos["a"].start + 12)
    expected = r"a\.safetensors: a: expected 40 bytes, the file ended after 12"
    with pytest.raises(CheckpointError, match=expected):
        read_tensor(infos["a"])
    path.unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors: b: cannot be read: No such file"):
        read_tensor(infos["b"])


def test_many_tensors_come_in_the_order_asked_for(tmp_path):
    arrays = {name: np.full(3, i, np.int32) for i, name in enumerate("abcdef")}
    infos = {}
    for file in ("x", "y"):
        names = list(arrays)[file == "y" :: 2]
        save_file({n: arrays[n] for n in names}, tmp_path / f"{file}.safetensors")
        infos |= read_header(tmp_path / f"{file}.safetensors")
    order = ["f", "a", "c", "b", "a"]
    found = read_tensors([infos[name] for name in order])
    assert [array[0] for array in found] == [list(arrays).index(name) for name in order]
    assert read_tensors([]) == []
    (tmp_path / "y.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"y\.safetensors: cannot be read: No such file"):
        read_tensors(infos.values())


def test_a_tensor_splits_into_those_along_its_first_axis(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(4, 3, 2)
    save_file({"before": np.zeros(5), "a": array}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["a"]
    parts = info.split()
    assert [part.name for part in parts] == ["a[0]", "a[1]", "a[2]", "a[3]"]
    np.testing.assert_array_equal(np.stack(read_tensors(parts)), array)
    assert sum(part.nbytes for part in parts) == info.nbytes


def _data_start(path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")
