"""A copy of a source that is another one now is refused; one whose source is gone is good."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxwna16
from loaders.errors import CheckpointError
from loaders.files.new_folder import write_shards
from tests.jaxwna16.checkpoints.converted import assert_same, refuse, write_source

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory) -> Path:
    """A source that stays as it is."""
    return write_source(tmp_path_factory.mktemp("unchanged") / "source")


@pytest.fixture
def source(unchanged, tmp_path) -> Path:
    """A source to be changed."""
    return Path(shutil.copytree(unchanged, tmp_path / "source"))


@pytest.fixture
def copy(source) -> Path:
    """The copy that was made of it."""
    jaxwna16.convert_checkpoint(source, source.with_name("copy"))
    return source.with_name("copy")


def test_copy_without_its_source_is_good(source, copy, unchanged):
    expected = jaxwna16.load_checkpoint(unchanged)
    (source / FIRST).unlink()
    assert_same(jaxwna16.load_checkpoint(copy), expected)
    shutil.rmtree(source)
    assert_same(jaxwna16.load_checkpoint(copy), expected)


def test_copy_at_another_place_is_still_compared_with_its_source(source, copy, tmp_path):
    moved = copy.rename(tmp_path / "moved")
    assert jaxwna16.load_checkpoint(moved).params
    _append_space(source / SECOND)
    refuse(moved, f"jaxwna16.json: was converted from {source}")


def _append_space(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def _flip_last_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def _replace(old: bytes, new: bytes):
    def edit(path: Path) -> None:
        raw = path.read_bytes()
        assert old in raw
        path.write_bytes(raw.replace(old, new))

    return edit


@pytest.mark.parametrize("same_time", [False, True], ids=["later", "same time"])
@pytest.mark.parametrize(
    ("name", "edit", "how"),
    [
        ("config.json", _append_space, "bytes, it had"),
        ("config.json", _replace(b"0.17.0", b"0.18.0"), "its contents differ"),
        (INDEX, _replace(b"{}", b"[]"), "its contents differ"),
        (SECOND, _append_space, "bytes, it had"),
        (SECOND, _flip_last_bit, "its contents differ"),
        (FIRST, _replace(b'"BF16"', b'"F16" '), "its header differs"),
    ],
    ids=["config size", "config", "index", "shard size", "shard", "header"],
)
def test_source_that_has_changed_is_noticed(source, copy, name, edit, how, same_time):
    before = (source / name).stat()
    edit(source / name)
    if same_time:
        os.utime(source / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    if same_time and edit is _flip_last_bit:
        # of a shard, nobody reads the tensors for as long as size, header and time are the same
        assert jaxwna16.load_checkpoint(copy).params
        return
    error = refuse(copy, f"was converted from {source}, where {name} has changed: ")
    assert how in str(error)


def test_every_file_that_has_changed_is_listed(source, copy):
    for name in ("config.json", SECOND):
        _append_space(source / name)
    refuse(copy, "config.json has changed", f"{SECOND} has changed")


def test_checkpoint_of_another_form_at_the_place_of_the_source_is_noticed(source, copy):
    for path in source.glob("model*"):
        path.unlink()
    save_file({"a": np.zeros(1)}, source / "model.safetensors")
    refuse(copy, "where model.safetensors has changed: it was not there")


def test_another_checkpoint_of_the_same_shapes_is_noticed(source, copy):
    for shard in (FIRST, SECOND):
        tensors = {name: array.copy() for name, array in load_file(source / shard).items()}
        for name, array in tensors.items():
            array[...] = array + 1 if name.endswith("weight_packed") else array
        save_file(tensors, source / shard)
    refuse(copy, f"{FIRST} has changed", f"{SECOND} has changed")


def test_source_that_was_only_touched_is_read_and_remarked_on(source, copy):
    os.utime(source / FIRST, ns=(1, 1))
    (remark,) = jaxwna16.load_checkpoint(copy).warnings
    assert f"{source / FIRST} was touched since" in remark


def test_pipe_in_the_place_of_the_source_does_not_block(source, copy):
    for path in source.iterdir():
        path.unlink()
        os.mkfifo(path)
    assert jaxwna16.load_checkpoint(copy).params


def test_source_that_changes_while_it_is_converted_is_noticed(source, monkeypatch):
    def touch_and_write(*args, **options):
        os.utime(source / FIRST, ns=(1, 1))
        return write_shards(*args, **options)

    monkeypatch.setattr("jaxwna16.checkpoints.convert.write_shards", touch_and_write)
    with pytest.raises(CheckpointError, match=f"{FIRST}: changed after its header was read"):
        jaxwna16.convert_checkpoint(source, source.with_name("copy"))
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_faults_of_the_source_are_listed_and_nothing_is_left(source):
    for shard in (FIRST, SECOND):
        tensors = load_file(source / shard)
        for name, array in tensors.items():
            if name.endswith("weight_scale"):
                tensors[name] = np.zeros_like(array)
        save_file(tensors, source / shard)
    with pytest.raises(CheckpointError, match="scales are zero or not finite") as error:
        jaxwna16.convert_checkpoint(source, source.with_name("copy"))
    assert len(error.value.faults) == 11
    assert [path.name for path in source.parent.iterdir()] == ["source"]
