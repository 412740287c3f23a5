"""Copies that are refused: damaged, of another version, or of a source that is another one now."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxwna16
from loaders.converted.manifest import MANIFEST
from loaders.errors import CheckpointError
from tests.jaxwna16.checkpoints.converted import Q, edit_manifest, refuse, write_source

FILE = "jaxwna16.safetensors"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A folder with a source and its copy, which stay as they are."""
    folder = tmp_path_factory.mktemp("pair")
    write_source(folder / "source")
    jaxwna16.convert_checkpoint(folder / "source", folder / "copy", progress=False)
    return folder


@pytest.fixture
def copy(pair, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(pair / "copy", tmp_path / "copy"))


def _edit_tensors(copy: Path, edit) -> None:
    tensors = load_file(copy / FILE)
    edit(tensors)
    save_file(tensors, copy / FILE)


def test_another_layout_is_refused(copy):
    edit_manifest(copy, lambda table: table.update(layout_version=2))
    refuse(copy, "layout_version: this release reads tile layout 1, found 2 (convert it again)")


def test_manifest_of_a_newer_format_is_refused_before_it_is_understood(copy):
    text = json.dumps({"format": "jaxwna16 converted checkpoint", "version": 9})
    (copy / MANIFEST).write_text(text)
    refuse(copy, "this release reads version 1, found 9 (install a newer jaxwna16")


def test_manifest_of_something_else_is_refused(copy):
    (copy / MANIFEST).write_text('{"format": "else"}')
    error = refuse(copy, "format: expected 'jaxwna16 converted checkpoint', found 'else'")
    assert error.faults[0].file == MANIFEST


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', "\xff"])
def test_manifest_that_is_no_json_object_is_refused(copy, text):
    (copy / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"jaxwna16\.json: (not valid JSON|expected a JSON)"):
        jaxwna16.load_checkpoint(copy)


def test_manifest_that_is_missing_is_missed(copy):
    (copy / MANIFEST).unlink()
    refuse(copy, "jaxwna16.json: the file is missing: config.json says")


def test_manifest_that_was_edited_is_refused(copy):
    module = lambda table: table["modules"][Q]  # noqa: E731
    # 70 and 69 rows are equally many tiles: without the checksum nothing would tell
    edit_manifest(copy, lambda table: module(table).update(out_features=69), signed=False)
    refuse(copy, "sha256: it was changed after it was written")


# what a manifest must have, and of which kinds; null is no number of experts
KEYS = {
    "version": int,
    "layout_version": int,
    "jaxwna16": str,
    "source": dict,
    "source.folder": str,
    "source.files": dict,
    "source.files.config.json.size": int,
    "quantization": dict,
    "warnings": list,
    "modules": dict,
    f"modules.{Q}.bits": int,
    f"modules.{Q}.experts": type(None),
    "tensors": dict,
    f"tensors.{Q}.packed.file": str,
    f"tensors.{Q}.packed.shape": list,
    "sha256": str,
}
VALUES = (None, "7", 7.5, True, [], {})


def _find(table: dict, path: str) -> tuple[dict, str]:
    """The object that holds what a path of keys names, and the last key."""
    for key in sorted(table, key=len, reverse=True):
        if path == key:
            return table, key
        if path.startswith(f"{key}."):
            return _find(table[key], path.removeprefix(f"{key}."))
    raise KeyError(path)


@pytest.mark.parametrize("path", KEYS)
def test_every_key_that_is_missing_is_named(copy, path):
    def remove(table):
        holder, key = _find(table, path)
        del holder[key]

    edit_manifest(copy, remove)
    key = path.removeprefix("modules.").removeprefix("tensors.")
    refuse(copy, f"jaxwna16.json: {key}: the key is missing")


@pytest.mark.parametrize(
    ("path", "value"),
    [(path, value) for path, kind in KEYS.items() for value in VALUES if type(value) is not kind],
)
def test_a_value_of_another_kind_is_refused(copy, path, value):
    def replace(table):
        holder, key = _find(table, path)
        holder[key] = value

    edit_manifest(copy, replace, signed=path != "sha256")
    with pytest.raises(CheckpointError, match=r"jaxwna16\.json: "):
        jaxwna16.load_checkpoint(copy)


def _move(table: dict, old: str, new: str) -> None:
    table[new] = table.pop(old)


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda t: t["modules"][Q].update(bits=5), f"{Q}: QuantSpec.bits must be one of"),
        (lambda t: t["modules"][Q].update(group_size=31), f"{Q}: QuantSpec.group_size must divide"),
        (lambda t: t["modules"][Q].update(out_features=10**30), f"{Q}: weights contradict"),
        (lambda t: t["modules"][Q].update(experts=2), f"{Q}: weights contradict"),
        (lambda t: t["modules"][Q].update(experts=0), f"{Q}: expected at least one expert"),
        (lambda t: t["modules"][Q].update(symmetric=True), f"{Q}: weights contradict"),
        (lambda t: t["modules"].update(none=t["modules"][Q]), "none: weights contradict"),
        (lambda t: t["tensors"][f"{Q}.scale"].update(file="../a.safetensors"), "expected the name"),
        (lambda t: t["tensors"][f"{Q}.scale"].update(file="a.bin"), "expected the name of a"),
        (lambda t: t["tensors"][f"{Q}.scale"].update(dtype="int128"), "unknown dtype 'int128'"),
        (lambda t: t["tensors"][f"{Q}.scale"].update(shape=[-1]), "shape: expected sizes"),
        (lambda t: _move(t["source"]["files"], "config.json", "../config.json"), "is no file of a"),
        (lambda t: _move(t["source"]["files"], "config.json", "passwd"), "is no file of a"),
        (lambda t: t["quantization"].update(architectures=[]), "expected quantization_config or"),
        (lambda t: t.update(more=1), "more: the key is unknown"),
        (lambda t: t["warnings"].append(1), "warnings: expected texts"),
    ],
)
def test_a_manifest_that_means_nonsense_is_refused(copy, edit, what):
    edit_manifest(copy, edit)
    refuse(copy, what)


def test_leaf_in_the_place_of_others_is_refused(copy):
    def add(table):
        table["tensors"]["model"] = table["tensors"]["scalar"]

    edit_manifest(copy, add)
    assert "model: this is the name of a tensor and the path" in str(refuse(copy))


def test_every_tensor_in_which_files_and_manifest_disagree_is_named(copy):
    def damage(tensors):
        del tensors["scalar"]
        tensors["more"] = np.zeros(3, np.int8)
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
        tensors[f"{Q}.packed"] = tensors[f"{Q}.packed"].view(np.int16)

    _edit_tensors(copy, damage)
    refuse(
        copy,
        f"{FILE}: scalar: jaxwna16.json says it is there",
        f"{FILE}: more: jaxwna16.json does not say it is there",
        f"{FILE}: model.norm.weight: jaxwna16.json says float32 [7], found float32 [6]",
        f"{FILE}: {Q}.packed: jaxwna16.json says uint16 [2, 1, 64, 32], found int16 [2, 1, 64, 32]",
    )


def test_file_that_is_missing_or_cut_off_is_named(copy):
    whole = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(whole[:-10])
    refuse(copy, "the file is truncated")
    (copy / FILE).unlink()
    refuse(copy, f"{FILE}: the file is missing")


def test_file_that_is_a_link_out_of_the_folder_is_refused(copy, tmp_path):
    os.replace(copy / FILE, tmp_path / "outside.safetensors")
    (copy / FILE).symlink_to(tmp_path / "outside.safetensors")
    assert "a link that leaves" in str(refuse(copy))


def test_config_of_another_checkpoint_is_refused(copy, pair):
    shutil.copyfile(pair / "source" / "config.json", copy / "config.json")
    refuse(copy, "config.json: quantization_config.quant_method: is not that of a converted")


@pytest.mark.parametrize(
    "rewrite",
    [jaxwna16.convert_checkpoint, jaxwna16.quantize_checkpoint, jaxwna16.dequantize_checkpoint],
    ids=lambda function: function.__name__,
)
def test_copy_is_no_source(copy, pair, tmp_path, rewrite):
    match = rf"jaxwna16\.json: this is a converted copy.*use {pair / 'source'}"
    with pytest.raises(CheckpointError, match=match):
        rewrite(copy, tmp_path / "out")
    edit_manifest(copy, lambda table: table.pop("source"))
    with pytest.raises(CheckpointError, match="use the checkpoint that it was made from"):
        rewrite(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_manifest_is_plain_json(pair):
    table = json.loads((pair / "copy" / MANIFEST).read_text())
    assert table["source"]["folder"] == str(pair / "source")
    assert len(table["source"]["files"]) == 4
