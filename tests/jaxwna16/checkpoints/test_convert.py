"""`convert_checkpoint`: the copy gives the same arrays, without repacking and without copying."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

import jaxwna16
import loaders.converted.converted
from loaders.errors import CheckpointError
from loaders.files.new_folder import write_shards
from loaders.files.safetensors_file import read_tensor
from loaders.open import open_plan
from loaders.plan import make_plan
from tests.folders import write_folder
from tests.jaxwna16.checkpoints.converted import EXPERTS, Q, assert_same, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("converted") / "source")


@pytest.fixture(scope="module")
def copy(source):
    jaxwna16.convert_checkpoint(source, source.parent / "copy", progress=False)
    return source.parent / "copy"


def test_copy_gives_what_the_source_gives(source, copy):
    expected = jaxwna16.load_checkpoint(source)
    assert_same(jaxwna16.load_checkpoint(copy), expected)
    assert "perm" in expected.params["model"]["layers"]["0"]["self_attn"]["q_proj"]
    assert expected.specs[f"{EXPERTS}.w13"].out_features == 80


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_copy_is_cast_as_the_source_is(source, copy, dtype):
    expected = jaxwna16.load_checkpoint(source, dtype=dtype)
    assert_same(jaxwna16.load_checkpoint(copy, dtype=dtype), expected)


def test_copy_in_several_files_gives_the_same(source, tmp_path, monkeypatch):
    small = functools.partial(write_shards, shard_bytes=5000)
    monkeypatch.setattr("jaxwna16.checkpoints.convert.write_shards", small)
    jaxwna16.convert_checkpoint(source, tmp_path / "copy")
    files = {path.name for path in (tmp_path / "copy").glob("*.safetensors")}
    assert "jaxwna16-00001-of-00007.safetensors" in files
    assert_same(jaxwna16.load_checkpoint(tmp_path / "copy"), jaxwna16.load_checkpoint(source))


def test_copy_of_floats_gives_the_same(tmp_path):
    weights = {"a.weight": np.ones((3, 4), np.float32)}
    source = write_folder(tmp_path / "source", {"k": [1]}, [weights])
    jaxwna16.convert_checkpoint(source, tmp_path / "copy")
    found = jaxwna16.load_checkpoint(tmp_path / "copy")
    assert_same(found, jaxwna16.load_checkpoint(source))
    assert found.config == {"k": [1]}


def test_plan_of_the_copy_describes_the_same_leaves(source, copy):
    expected, plan = make_plan(source), open_plan(copy)
    assert plan.describe_leaves() == expected.describe_leaves()
    assert plan.nbytes == sum(leaf.nbytes for leaf in plan.leaves.values())


def test_arrays_are_the_buffers_that_were_read_into(copy, monkeypatch):
    read = {}

    def note(info):
        read[info.name] = read_tensor(info)
        return read[info.name]

    monkeypatch.setattr(loaders.converted.converted, "read_tensor", note)
    params = jaxwna16.load_checkpoint(copy).params
    stack = params["model"]["layers"]["0"]["mlp"]["experts"]["w13"]
    for name, leaf in stack.items():
        assert leaf.unsafe_buffer_pointer() == read[f"{EXPERTS}.w13.{name}"].ctypes.data
    scale = params["model"]["layers"]["0"]["self_attn"]["q_proj"]["scale"]
    assert scale.unsafe_buffer_pointer() == read[f"{Q}.scale"].ctypes.data


def test_nothing_is_repacked(copy, monkeypatch):
    for name in ("_pack", "_pack_expert"):
        monkeypatch.setattr(f"loaders.modules.repack.{name}", None)
    assert jaxwna16.load_checkpoint(copy).params


def test_progress_comes_to_the_end(source, copy):
    calls = []
    jaxwna16.load_checkpoint(copy, progress=lambda *call: calls.append(call))
    done, total, names = zip(*calls, strict=True)
    assert done[-1] == total[0] == open_plan(copy).nbytes
    assert len(set(names)) == len(jax.tree.leaves(jaxwna16.load_checkpoint(source).params))


def test_tokenizer_comes_along_and_config_is_nobody_elses(source, copy):
    assert (copy / "tokenizer.json").read_text() == "{}"
    config = json.loads((copy / "config.json").read_text())
    assert config == {"quantization_config": {"quant_method": "jaxwna16", "layout_version": 1}}
    names = {path.name for path in copy.iterdir()}
    assert not {name for name in names if name.startswith("model")}


def test_values_too_large_for_the_dtype_are_named(tmp_path):
    arrays = {"a.weight": np.array([1e6, 1], np.float32), "b.weight": np.ones(2, np.float32)}
    source = write_folder(tmp_path / "source", {}, [arrays])
    jaxwna16.convert_checkpoint(source, tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"a\.weight: 1 of 2 values are too large") as error:
        jaxwna16.load_checkpoint(tmp_path / "copy", dtype="float16")
    assert len(error.value.faults) == 1
