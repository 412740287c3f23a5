"""A checkpoint that changes while it is read: an error, and never numbers of two checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import jaxwna16
from jaxwna16 import CheckpointError
from jaxwna16.checkpoints.load import read_plan
from loaders.files import new_folder, safetensors_file
from loaders.open import open_plan
from tests.jaxwna16.checkpoints.converted import write_source


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory) -> dict[str, Path]:
    """What each function makes a copy of."""
    place = tmp_path_factory.mktemp("unchanged")
    packed = write_source(place / "packed")
    jaxwna16.dequantize_checkpoint(packed, place / "floats")
    jaxwna16.convert_checkpoint(packed, place / "converted")
    return {name: place / name for name in ("packed", "floats", "converted")}


def _copy(source: Path, place: Path) -> Path:
    """A copy that was last changed long ago, so that every change to it has another time."""
    folder = Path(shutil.copytree(source, place / "source"))
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))
    return folder


def _flip(path: Path, *places: int) -> None:
    """Flip words in place; the file keeps its size, header and time of change."""
    before = path.stat()
    with open(path, "r+b") as file:
        for place in places:
            file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _flip_first_and_last(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        _flip(path, 8 + header, -1)


def _edit(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b" ")


WRITERS = {
    "dequantize": ("packed", jaxwna16.dequantize_checkpoint),
    "quantize": (
        "floats",
        lambda *folders: jaxwna16.quantize_checkpoint(*folders, group_size=-1, symmetric=False),
    ),
    "convert": ("packed", jaxwna16.convert_checkpoint),
}
CHANGES = {
    "words": _flip_first_and_last,
    "config.json": _edit("config.json"),
    "tokenizer.json": _edit("tokenizer.json"),
    "index": lambda folder: (folder / new_folder.INDEX).write_text("{}"),
    "a file that is gone": lambda folder: min(folder.glob("*.safetensors")).unlink(),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_of_a_source_that_changes_meanwhile_is_not_made(
    unchanged, tmp_path, monkeypatch, writer, when, change
):
    base, write = WRITERS[writer]
    source = _copy(unchanged[base], tmp_path)
    write_shards = new_folder.write_shards

    def change_and_write(folder, tensors, **options):
        def list_tensors():
            first = next(iterator := iter(tensors))
            if when == "early":
                CHANGES[change](source)
            yield first
            yield from iterator
            if when == "late":
                CHANGES[change](source)

        return write_shards(folder, list_tensors(), **options)

    module = "jaxwna16.checkpoints.convert" if writer == "convert" else "loaders.write"
    monkeypatch.setattr(f"{module}.write_shards", change_and_write)
    with pytest.raises(CheckpointError, match=r"changed|the file is missing|cannot be read"):
        write(source, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _link(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def _make_pipe(path: Path, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _make_folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


SWAPS: dict[str, Callable[[Path, Path], object]] = {
    "other numbers in the same place": lambda path, _: _flip(path, -1),
    "another file under the name": lambda path, other: os.replace(other, path),
    "another header": lambda path, _: _flip(path, 9),
    "a longer file": lambda path, _: path.write_bytes(path.read_bytes() + b"x"),
    "a shorter file": lambda path, _: os.truncate(path, path.stat().st_size - 9),
    "an empty file": lambda path, _: os.truncate(path, 0),
    "a link": _link,
    "a pipe": _make_pipe,
    "a folder": _make_folder,
    "no file": lambda path, _: path.unlink(),
}


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("base", ["packed", "converted"])
def test_files_that_are_swapped_between_plan_and_reading_are_refused(
    unchanged, tmp_path, swap, base
):
    folder, other = _copy(unchanged[base], tmp_path), tmp_path / "other"
    path = min(folder.glob("*.safetensors"))
    shutil.copy2(path, other)  # of the same size and time
    plan = open_plan(folder)
    SWAPS[swap](path, other)
    with pytest.raises(
        CheckpointError,
        match=rf"{path.name}: (.*: )?(changed after|cannot be read|expected .* ended after)",
    ):
        read_plan(plan)


def test_a_file_that_changes_during_a_read_is_refused(unchanged, tmp_path, monkeypatch):
    folder = _copy(unchanged["packed"], tmp_path)
    info = next(iter(open_plan(folder).plain.values()))
    make_zeros = safetensors_file.make_zeros

    def change(*arguments):
        _flip(info.file, -1)
        return make_zeros(*arguments)

    monkeypatch.setattr(safetensors_file, "make_zeros", change)
    with pytest.raises(CheckpointError, match="changed after its header was read"):
        safetensors_file.read_tensor(info)


def test_what_is_only_read_by_others_or_linked_to_loads(unchanged, tmp_path):
    folder = _copy(unchanged["packed"], tmp_path)
    plan = open_plan(folder)
    for path in folder.iterdir():
        path.read_bytes()
        (tmp_path / f"{path.name} too").symlink_to(path)
    assert read_plan(plan).specs
