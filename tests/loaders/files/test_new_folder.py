"""Writing a checkpoint: what loads again, in shards or not, or nothing under the final name."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from loaders.errors import CheckpointError
from loaders.files.folder import INDEX
from loaders.files.new_folder import build_folder
from loaders.plan import make_plan
from loaders.stream import load_params
from loaders.write import write_checkpoint

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(6).astype(ml_dtypes.bfloat16),
    "scalar": np.array(2.5, np.float16),
    "empty": np.zeros((0, 3), np.int8),
    "steps": np.array([2**40]),
    "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
}


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", INDEX, "model.safetensors", "pytorch_model.bin", "LICENSE", "a.py"):
        (folder / name).write_text("of the source")
    for name in ("tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja"):
        (folder / name).write_text("copied")
    for name in ("onnx", "additional_chat_templates"):
        (folder / name).mkdir()
        (folder / name / "tool_use.jinja").write_text("copied")
    return folder


def _list_leftovers(tmp_path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name != "source")


@pytest.mark.parametrize("shard_bytes", [1, 30, 10**9])
def test_what_was_written_loads_bit_for_bit(tmp_path, source, shard_bytes):
    out = tmp_path / "out"
    write_checkpoint(out, TENSORS.items(), {"k": 1}, beside=source, shard_bytes=shard_bytes)
    assert json.loads((out / "config.json").read_text()) == {"k": 1}
    params = load_params(make_plan(out))
    expected = {name: array for name, array in TENSORS.items() if "." not in name}
    expected |= {name[0]: {"weight": TENSORS[name]} for name in ("a.weight", "b.weight")}
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for found, array in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.asarray(found).tobytes() == array.tobytes()
    assert _list_leftovers(tmp_path) == ["out"]


def test_shards_are_named_indexed_and_no_larger_than_asked(tmp_path, source):
    out = tmp_path / "out"
    write_checkpoint(out, TENSORS.items(), {}, beside=source, shard_bytes=60)
    index = json.loads((out / INDEX).read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    assert len(shards) > 1
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in TENSORS.values())
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["weight_map"].keys() == TENSORS.keys()
    for shard in shards:
        names = [name for name, file in index["weight_map"].items() if file == shard]
        assert sum(TENSORS[name].nbytes for name in names) <= 60


def test_small_files_come_along_and_weights_code_and_config_do_not(tmp_path, source):
    out = tmp_path / "out"
    write_checkpoint(out, TENSORS.items(), {}, beside=source)
    copied = {"tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "LICENSE"}
    written = {"config.json", "model.safetensors", "additional_chat_templates"}
    assert {path.name for path in out.iterdir()} == copied | written
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "copied"
    assert os.stat(out / "model.safetensors").st_mode & 0o777 == 0o644


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_existing_destination_is_refused_and_left_alone(tmp_path, source, kind):
    out = tmp_path / "out"
    out.mkdir() if kind == "folder" else out.write_text("mine")
    with pytest.raises(CheckpointError, match=r"destination exists already .name a new folder"):
        write_checkpoint(out, TENSORS.items(), {}, beside=source)
    assert _list_leftovers(tmp_path) == ["out"]
    assert list(out.iterdir()) == [] if kind == "folder" else out.read_text() == "mine"


def test_what_could_not_be_read_again_gets_no_name(tmp_path, source):
    tensors = {"m.weight_packed": np.zeros((8, 4), np.int32)}
    with pytest.raises(
        CheckpointError, match="the new checkpoint could not be read again, and is removed"
    ) as caught:
        write_checkpoint(tmp_path / "out", tensors.items(), {}, beside=source)
    assert len(caught.value.faults) > 1  # with what is wrong with it
    assert _list_leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_exception_midway_leaves_nothing(tmp_path, source, error, after):
    def give():
        for i, item in enumerate(TENSORS.items()):
            if i == after:
                raise error("stop")
            yield item

    with pytest.raises(error, match="stop"):
        write_checkpoint(tmp_path / "out", give(), {}, beside=source, shard_bytes=1)
    assert _list_leftovers(tmp_path) == []


def test_full_disk_is_an_error_of_ours_and_leaves_nothing(tmp_path, source):
    """A limit on the size of files fails as a full disk does: in the midst of writing."""
    big = {"a": np.zeros(1 << 20, np.uint8)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written: .*(too large|os error 27)"):
            write_checkpoint(tmp_path / "out", big.items(), {}, beside=source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert _list_leftovers(tmp_path) == []


def test_place_where_nothing_can_be_made_is_an_error_of_ours(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        write_checkpoint(tmp_path / "file" / "out", TENSORS.items(), {}, beside=source)


_SLOW_WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from loaders.write import write_checkpoint

def give():
    yield "a", np.zeros(10)
    yield "b", np.zeros(10)
    print("midway", flush=True)
    time.sleep(60)

out, source = map(Path, sys.argv[1:])
write_checkpoint(out, give(), {}, beside=source, shard_bytes=1)
"""


def test_killed_writer_leaves_nothing_under_the_final_name_and_the_next_one_works(tmp_path, source):
    out = tmp_path / "out"
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _SLOW_WRITER, str(out), str(source)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"midway\n"
        writer.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert all(name.startswith(".") for name in _list_leftovers(tmp_path))
    write_checkpoint(out, TENSORS.items(), {}, beside=source)
    assert _list_leftovers(tmp_path) == ["out"]


def test_folder_is_named_only_when_the_block_ends(tmp_path):
    out = tmp_path / "deep" / "out"
    with build_folder(out) as partial:
        (partial / "x").write_text("1")
        assert not out.exists()
    assert (out / "x").read_text() == "1"
    assert not partial.exists()


def test_two_writers_do_not_meet_in_one_folder(tmp_path):
    out = tmp_path / "out"
    with build_folder(out) as partial:
        (partial / "x").write_text("first")
        with pytest.raises(CheckpointError, match=r"another process is making it .wait for it"):
            with build_folder(out):
                raise AssertionError("both are in it")
        assert (partial / "x").read_text() == "first"
    assert (out / "x").read_text() == "first"
    assert _list_leftovers(tmp_path) == ["out"]


def test_what_a_dead_writer_left_is_removed(tmp_path):
    left = tmp_path / ".out.partial"
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "x").write_text("half")
    (left / "0.safetensors").write_text("half")
    with build_folder(tmp_path / "out") as partial:
        assert list(partial.iterdir()) == []
    assert list((tmp_path / "out").iterdir()) == []
    assert _list_leftovers(tmp_path) == ["out"]


def test_link_under_the_hidden_name_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("kept")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="cannot be written"):
        with build_folder(tmp_path / "out"):
            raise AssertionError("it is somebody's")
    assert (tmp_path / "mine" / "x").read_text() == "kept"


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, source, monkeypatch):
    flushed, out, fsync = set(), tmp_path / "out", os.fsync

    def note(file):
        assert not out.exists()
        flushed.add(os.fstat(file).st_ino)
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    write_checkpoint(out, TENSORS.items(), {}, beside=source, shard_bytes=60)
    assert flushed == {path.stat().st_ino for path in out.rglob("*") if path.is_file()}


def test_jax_arrays_are_written_too(tmp_path, source):
    write_checkpoint(tmp_path / "out", [("a", np.asarray(jnp.ones((2, 3))))], {}, beside=source)
    assert make_plan(tmp_path / "out").plain["a"].shape == (2, 3)
