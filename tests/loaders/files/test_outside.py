"""No file outside of a checkpoint's folder is opened, whatever its files say, are or link to.

Every folder here is loaded in one other process, in which a hook of the interpreter notes each file
that is opened, also by a thread and by whatever library.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxwna16 import CheckpointError, load_checkpoint
from loaders.converted.manifest import MANIFEST, hash_table
from loaders.files.folder import CONFIG, INDEX, SINGLE
from loaders.files.new_folder import copy_companions
from tests.fuzz.bases import make_bases

ROOT = Path(__file__).parents[3]
SHARD = "model-00001-of-00002.safetensors"
_LOAD = """
import json, os, sys
import jax
from jaxwna16 import load_checkpoint
from loaders.errors import CheckpointError

opened = None
def note(event, arguments):
    if opened is not None and event == "open" and not isinstance(arguments[0], int):
        opened.append(os.fsdecode(arguments[0]))

good, *folders = sys.argv[1:]
load_checkpoint(good)  # imports and compiles what there is to
sys.addaudithook(note)
for folder in [good, *folders]:
    opened = []
    try:
        load_checkpoint(folder)
        text = ""
    except CheckpointError as error:
        text = str(error)
    found, opened = opened, None
    print(json.dumps([text, found]))
"""


def _write(folder: Path, base: str = "symmetric, shards") -> Path:
    folder.mkdir(parents=True)
    for name, content in make_bases()[base].items():
        (folder / name).write_bytes(content)
    return folder


def _point(folder: Path, shard: str) -> None:
    """Let the index name one file for every tensor."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], shard)
    (folder / INDEX).write_text(json.dumps(index))


def _replace(path: Path, target: str | os.PathLike[str]) -> None:
    path.unlink()
    path.symlink_to(target)


def _make_hostile(root: Path) -> dict[str, Path]:
    """Name -> a checkpoint that would have something outside of it read."""
    outside = _write(root / "outside")
    (outside / SINGLE).write_bytes(make_bases()["asymmetric"][SINGLE])
    folders = {}

    def make(name: str, base: str = "symmetric, shards") -> Path:
        folders[name] = _write(root / "hostile" / str(len(folders)) / "c", base)
        return folders[name]

    shards = {
        "absolute": str(outside / SHARD),
        "dots": f"../../../outside/{SHARD}",
        "dots in the middle": f"x/../../../../outside/{SHARD}",
        "backslash": f"..\\..\\..\\outside\\{SHARD}",
        "below": f"sub/{SHARD}",
        "NUL": f"{SHARD}\0.safetensors",
        "NUL before": f"{outside / SHARD}\0.safetensors",
        "home": f"~/{SHARD}",
        "URL": f"file://{outside / SHARD}",
        "dot": f"./{SHARD}",
        "empty": "",
        "parent": "..",
        "newline": f"../x\n/{SHARD}",
        "device": "/dev/zero",
        "code": "modeling.py",
        "pickle": "pytorch_model.bin",
        "config": CONFIG,
    }
    for name, shard in shards.items():
        folder = make(name)
        (folder / "sub").symlink_to(outside)
        for other in ("modeling.py", "pytorch_model.bin"):
            (folder / other).write_bytes(make_bases()["asymmetric"][SINGLE])
        _point(folder, shard)
    for file in (SHARD, CONFIG, INDEX):
        _replace(make(f"link: {file}") / file, outside / file)
        _replace(make(f"relative link: {file}") / file, f"../../../outside/{file}")
        folder = make(f"link to a link: {file}")
        (folder / "first").symlink_to(outside / file)
        _replace(folder / file, "first")
        folder = make(f"link through a linked folder: {file}")
        (folder / "sub").symlink_to(outside)
        _replace(folder / file, f"sub/{file}")
        _replace(make(f"device: {file}") / file, "/dev/zero")
        _replace(make(f"process: {file}") / file, "/proc/self/environ")
        _replace(make(f"circle: {file}") / file, file)
        _replace(make(f"link to nothing: {file}") / file, "gone")
        folder = make(f"pipe: {file}")
        (folder / file).unlink()
        os.mkfifo(folder / file)
        folder = make(f"folder: {file}")
        (folder / file).unlink()
        (folder / file).mkdir()
    _replace(make("single", "asymmetric") / SINGLE, outside / SINGLE)
    _replace(make("manifest", "converted") / MANIFEST, outside / CONFIG)
    folder = make("files of a manifest", "converted")
    table = json.loads((folder / MANIFEST).read_text())
    table["tensors"]["mask"]["file"] = f"../../../outside/{SINGLE}"
    (folder / MANIFEST).write_text(json.dumps(table | {"sha256": hash_table(table)}))
    folder = make("source of a manifest", "converted")
    table["source"] = {"folder": "/etc", "files": {"passwd": table["source"]["files"][CONFIG]}}
    table["tensors"]["mask"]["file"] = "jaxwna16.safetensors"
    (folder / MANIFEST).write_text(json.dumps(table | {"sha256": hash_table(table)}))
    return folders


def test_nothing_outside_of_the_folder_is_opened(tmp_path):
    folders = _make_hostile(tmp_path)
    good = _write(tmp_path / "good")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _LOAD, str(good), *map(str, folders.values())]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (text, opened), *outcomes = map(json.loads, done.stdout.splitlines())
    assert not text
    # the hook sees what is opened: else the rest of this test would mean nothing
    assert {str(good / name) for name in (CONFIG, INDEX, SHARD)} <= set(opened)
    assert len(outcomes) == len(folders)
    system = ("/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup/", str(ROOT), sys.prefix)
    for (name, folder), (text, opened) in zip(folders.items(), outcomes, strict=True):
        assert text.startswith(f"{folder}: "), f"{name}: loaded"
        for path in opened:
            real = os.path.realpath(path)
            inside = real.startswith(f"{folder.resolve()}{os.sep}")
            assert inside or path.startswith((*system, sys.base_prefix)), f"{name}: opened {path}"
            assert not path.endswith((".py", ".bin")) or not inside, f"{name}: opened {path}"


@pytest.mark.parametrize("name", [SHARD, CONFIG, INDEX])
def test_a_socket_is_no_file(tmp_path, name, monkeypatch):
    folder = _write(tmp_path / "c")
    (folder / name).unlink()
    monkeypatch.chdir(folder)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        with pytest.raises(CheckpointError, match=f"{name}: this is not a file"):
            load_checkpoint(folder)


def test_a_link_that_leaves_the_folder_is_not_copied_with_the_tokenizer(tmp_path):
    source, copy = _write(tmp_path / "c"), tmp_path / "copy"
    copy.mkdir()
    (tmp_path / "secret").write_text("mine")
    (source / "real.txt").write_text("text")
    (source / "merges.txt").symlink_to("real.txt")
    copy_companions(source, copy)
    assert (copy / "merges.txt").read_text() == "text"
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the file is a link that leaves"):
        copy_companions(source, copy)
    assert not (copy / "tokenizer.json").exists()
