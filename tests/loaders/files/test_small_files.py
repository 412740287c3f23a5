"""Every file beside the weights as a stranger could send it: one clear error, soon, and no file of
the reader's own is opened."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import tracemalloc
from pathlib import Path

import pytest

from jaxwna16 import CheckpointError, Tokenizer, load_checkpoint
from jaxwna16.generation.generation_config import describe_unapplied
from loaders.files import small_files
from loaders.files.folder import INDEX
from loaders.files.new_folder import copy_companions
from loaders.files.small_files import (
    CONFIG,
    GENERATION,
    MAX_BYTES,
    SPECIAL_TOKENS,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_SETTINGS,
    list_settings_faults,
    read_bytes,
    read_json,
    read_settings,
)
from tests.fuzz.bases import make_bases

tokenizers = pytest.importorskip("tokenizers")

READERS = {
    CONFIG: load_checkpoint,
    INDEX: load_checkpoint,
    GENERATION: describe_unapplied,
    TOKENIZER: Tokenizer.from_folder,
    TOKENIZER_SETTINGS: Tokenizer.from_folder,
    SPECIAL_TOKENS: Tokenizer.from_folder,
    TEMPLATE: Tokenizer.from_folder,
}
"""Each file that is read, and who reads it."""
FILES = pytest.mark.parametrize("name", READERS)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint with every file that is read beside the weights."""
    made = tmp_path / "c"
    made.mkdir()
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    beside = {
        GENERATION: "{}",
        TOKENIZER: vocabulary.to_str(),
        TOKENIZER_SETTINGS: "{}",
        SPECIAL_TOKENS: "{}",
        TEMPLATE: "hello",
    }
    for name, content in make_bases()["symmetric, shards"].items():
        (made / name).write_bytes(content)
    for name, text in beside.items():
        (made / name).write_text(text)
    return made


def _refuse(folder: Path, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        READERS[name](folder)
    assert name in str(caught.value)


@FILES
def test_the_files_are_read_where_nothing_is_wrong_with_them(folder, name):
    READERS[name](folder)
    assert list_settings_faults(folder) == []


@FILES
@pytest.mark.parametrize("target", ["/etc/passwd", "../mine"])
def test_a_link_that_leaves_the_folder_is_not_followed(folder, name, target):
    (folder.parent / "mine").write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    _refuse(folder, name, "a link that leaves the checkpoint folder")
    if name != INDEX:
        assert "leaves" in list_settings_faults(folder)[0].what


@FILES
def test_a_link_to_a_file_of_the_folder_or_to_a_blob_of_the_hub_cache_is_followed(folder, name):
    snapshot = folder.parent / "snapshots" / "0123abc"
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    READERS[name](snapshot)
    assert list_settings_faults(snapshot) == []
    (folder / name).rename(folder / "real")
    (folder / name).symlink_to("real")
    READERS[name](folder)


@FILES
def test_a_link_that_leaves_is_followed_on_request(folder, name):
    (folder / name).rename(folder.parent / "mine")
    (folder / name).symlink_to("../mine")
    READERS[name](folder, follow_links=True)


@FILES
def test_what_is_no_file_is_refused_at_once(folder, name, monkeypatch):
    path, started = folder / name, time.perf_counter()
    path.unlink()
    os.mkfifo(path)
    _refuse(folder, name, "this is not a file")
    path.unlink()
    path.mkdir()
    _refuse(folder, name, "this is not a file")
    path.rmdir()
    path.symlink_to(name)
    _refuse(folder, name, "cannot be opened")
    path.unlink()
    path.symlink_to("nothing")
    _refuse(folder, name, "the file is missing")
    path.unlink()
    monkeypatch.chdir(folder)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        _refuse(folder, name, "this is not a file")
    assert time.perf_counter() - started < 5


@FILES
def test_a_device_is_refused_though_links_are_followed(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="this is not a file"):
        READERS[name](folder, follow_links=True)


@FILES
def test_a_terabyte_of_nothing_is_refused_before_it_is_read(folder, name):
    with open(folder / name, "r+b") as file:
        file.truncate(2**40)
    tracemalloc.start()
    _refuse(folder, name, "has 1,099,511,627,776 bytes, expected 1?[03][02],000,000 at most")
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    if name != INDEX:
        assert [fault.file for fault in list_settings_faults(folder)] == [name]


@FILES
def test_a_file_that_may_not_be_read_is_an_error_of_ours(folder, name, monkeypatch):
    real = os.open

    def refuse(path, *arguments, **more):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)  # the tests may run as root, who may read all
    _refuse(folder, name, "cannot be read: Permission denied")


@pytest.mark.parametrize("name", [CONFIG, INDEX, GENERATION, TOKENIZER_SETTINGS, SPECIAL_TOKENS])
@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": 1, "a": 2}', "duplicate keys: a"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[" * 99 + b"]" * 99, "nested more than 64"),
        (b"\xff", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[]", "expected a JSON object, found list"),
    ],
)
def test_json_is_read_strictly(folder, name, content, message):
    (folder / name).write_bytes(content)
    _refuse(folder, name, message)


def test_a_template_that_is_no_text_is_refused(folder):
    (folder / TEMPLATE).write_bytes(b"\xff")
    _refuse(folder, TEMPLATE, "not UTF-8")


def test_a_file_that_grows_while_it_is_read_is_refused(folder, monkeypatch):
    size = os.fstat

    def grow(file):
        found = size(file)
        with open(folder / GENERATION, "a") as more:
            more.write(" ")
        return found

    monkeypatch.setattr(os, "fstat", grow)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        read_bytes(folder, GENERATION)


def test_a_link_that_is_turned_after_the_check_is_not_followed(folder, monkeypatch):
    (folder.parent / "mine").write_text('{"mine": 1}')
    (folder / GENERATION).rename(folder / "real")
    (folder / GENERATION).symlink_to("real")
    open_file = small_files.open_file

    def turn_and_open(path):
        (folder / GENERATION).unlink()
        (folder / GENERATION).symlink_to("../mine")
        return open_file(path)

    monkeypatch.setattr(small_files, "open_file", turn_and_open)
    assert read_json(folder, GENERATION) == {}


def test_only_an_absent_file_is_empty(folder):
    (folder / GENERATION).unlink()
    assert read_settings(folder, GENERATION) == {}
    with pytest.raises(CheckpointError, match="the file is missing"):
        read_json(folder, GENERATION)


def test_what_would_be_copied_is_bounded_too(folder, tmp_path):
    (tmp_path / "copy").mkdir()
    with open(folder / "merges.txt", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match=r"merges\.txt: has 100,000,001 bytes"):
        copy_companions(folder, tmp_path / "copy")


def test_verify_reads_what_lies_beside_the_weights(folder):
    from jaxwna16.cli import main

    assert main.main(["verify", str(folder), "--json"]) == 0
    (folder / TOKENIZER_SETTINGS).write_text(json.dumps({"a": 1})[:-1])
    assert main.main(["verify", str(folder), "--json"]) == 1
