"""A checkpoint folder: config.json, one file or an index with shards, and nothing outside."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from loaders.errors import CheckpointError
from loaders.files.folder import INDEX, SINGLE, list_tensors, read_config

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_shards(folder, weight_map=None):
    save_file({"a": np.ones(2, np.float32), "b": np.ones(3, np.int8)}, folder / FIRST)
    save_file({"c": np.ones(4, np.int8)}, folder / SECOND)
    _write_index(folder, weight_map or {"a": FIRST, "b": FIRST, "c": SECOND})
    return folder


def test_shards_are_read_through_the_index(tmp_path):
    tensors = list_tensors(_write_shards(tmp_path))
    assert {name: info.file.name for name, info in tensors.items()} == {
        "a": FIRST,
        "b": FIRST,
        "c": SECOND,
    }
    assert tensors["b"].shape == (3,)


def test_single_file_needs_no_index(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / SINGLE)
    assert list_tensors(tmp_path).keys() == {"a"}


def test_neither_file_nor_index_is_a_missing_file(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: the file is missing \(download"
    ):
        list_tensors(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["/etc/hostname", "../outside.safetensors", "sub/a.safetensors", "..", ".", "", "a\\b", "a\0b"],
)
def test_shard_name_that_is_no_plain_name_is_refused(tmp_path, name):
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "outside.safetensors", folder / "sub" / "a.safetensors"):
        save_file({"a": np.ones(1)}, path)
    _write_index(folder, {"a": name})
    with pytest.raises(CheckpointError, match="must be a plain file name that ends in") as caught:
        list_tensors(folder)
    [fault] = caught.value.faults
    assert (fault.file, fault.tensor) == (INDEX, repr(name))


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".safetensors", "\ud800.safetensors", "circle.safetensors"]
)
def test_shard_name_that_no_file_can_have_is_an_error_of_ours(tmp_path, name):
    (tmp_path / "circle.safetensors").symlink_to("circle.safetensors")
    _write_index(tmp_path, {"a": name})
    with pytest.raises(CheckpointError, match="cannot be opened") as caught:
        list_tensors(tmp_path)
    str(caught.value).encode()  # printable


def test_a_single_file_beside_the_index_of_others_is_refused(tmp_path):
    """transformers reads the one, vLLM the others."""
    _write_shards(tmp_path)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=rf"{INDEX}: {SINGLE} is there too.* .remove {INDEX}"):
        list_tensors(tmp_path)
    (tmp_path / INDEX).unlink()
    assert list_tensors(tmp_path).keys() == {"a"}


@pytest.mark.parametrize("target", ["../outside.safetensors", "absolute"])
@pytest.mark.parametrize("indexed", [True, False])
def test_link_that_leaves_the_folder_is_refused(tmp_path, target, indexed):
    outside = tmp_path / "outside.safetensors"
    save_file({"a": np.ones(1, np.float32)}, outside)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    name = "link.safetensors" if indexed else SINGLE
    (folder / name).symlink_to(outside if target == "absolute" else target)
    if indexed:
        _write_index(folder, {"a": name})
    with pytest.raises(CheckpointError, match=f"{name}: the file is a link that leaves"):
        list_tensors(folder)


def test_link_that_stays_in_the_folder_is_followed(tmp_path):
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "real.safetensors")
    (tmp_path / SINGLE).symlink_to("real.safetensors")
    assert list_tensors(tmp_path).keys() == {"a"}


def test_hub_cache_links_to_blobs_are_followed_and_no_others(tmp_path):
    blobs, revision = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    revision.mkdir(parents=True)
    for name in (blobs / "0123", tmp_path / "models--x" / "secret"):
        save_file({"a": np.ones(1, np.float32)}, name)
    (revision / SINGLE).symlink_to("../../blobs/0123")
    assert list_tensors(revision).keys() == {"a"}
    (tmp_path / "short").symlink_to(revision)
    assert list_tensors(tmp_path / "short").keys() == {"a"}
    (revision / SINGLE).unlink()
    (revision / SINGLE).symlink_to("../../secret")
    with pytest.raises(CheckpointError, match="a link that leaves"):
        list_tensors(revision)


def test_index_and_headers_that_disagree_are_listed_tensor_by_tensor(tmp_path):
    weight_map = {"a": FIRST, "c": FIRST, "d": SECOND, "e": "gone.safetensors", "f": "../x"}
    with pytest.raises(CheckpointError) as caught:
        list_tensors(_write_shards(tmp_path, weight_map))
    found = {(fault.file, fault.tensor): fault.what for fault in caught.value.faults}
    assert found.keys() == {
        (FIRST, "b"),
        (FIRST, "c"),
        (SECOND, "c"),
        (SECOND, "d"),
        ("gone.safetensors", ""),
        (INDEX, "'../x'"),
    }
    assert found[FIRST, "b"] == f"is in {FIRST}, but not in the index for it"
    assert found[FIRST, "c"] == f"the index says {FIRST} holds it, its header does not"
    assert found["gone.safetensors", ""] == "the file is missing"


def test_tensor_that_stands_in_two_shards_is_refused(tmp_path):
    folder = _write_shards(tmp_path)
    save_file({"c": np.ones(4, np.int8), "a": np.zeros(2, np.float32)}, folder / SECOND)
    with pytest.raises(CheckpointError, match=f"{SECOND}: a: is in {SECOND}, but not in the index"):
        list_tensors(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\udcff"]
)
def test_index_that_is_no_index_is_refused(tmp_path, content):
    (tmp_path / INDEX).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=rf"{INDEX}: .*(JSON|weight_map)"):
        list_tensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json: the file is missing \(download"),
        ("{'a': 1}", r"config\.json: not valid JSON"),
        ("[" * 200_000, r"config\.json: not valid JSON"),
        ("3", r"config\.json: expected a JSON object, found int"),
    ],
)
def test_config_that_cannot_be_read_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_keys_that_stand_twice_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"rope": {"b": 1, "a": 1, "b": 2, "a": 2, "c": 3}}')
    with pytest.raises(CheckpointError, match=r"config\.json: .*duplicate keys: a, b"):
        read_config(tmp_path)
    folder = _write_shards(tmp_path)
    weight_map = (folder / INDEX).read_text().replace('"c": ', f'"a": "{SECOND}", "c": ')
    (folder / INDEX).write_text(weight_map)
    with pytest.raises(CheckpointError, match=rf"{INDEX}: .*duplicate keys: a "):
        list_tensors(folder)


@pytest.mark.parametrize("name", ["absent", "file"])
def test_what_is_no_folder_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=rf"{name}: 1 fault\n.*not a folder \(give the path"):
        read_config(tmp_path / name)


def test_folder_in_place_of_a_file_is_refused(tmp_path):
    os.mkdir(tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: this is not a file"):
        list_tensors(tmp_path)
