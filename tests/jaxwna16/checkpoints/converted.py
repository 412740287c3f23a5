"""A small checkpoint of everything that a tree can hold, and comparing two loaded ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxwna16.checkpoints.load import Checkpoint, load_checkpoint
from loaders.converted.manifest import MANIFEST, hash_table
from loaders.errors import CheckpointError
from pallas_kernels.format.spec import QuantSpec
from tests.folders import make_config, make_experts, make_tensors, prefix_names, write_folder

LAYER = "model.layers.0"
Q, GATES, EXPERTS = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp", f"{LAYER}.mlp.experts"


def _make_spec(bits: int, group: int, n: int, k: int, *, symmetric: bool = False) -> QuantSpec:
    return QuantSpec(
        bits=bits, group_size=group, symmetric=symmetric, in_features=k, out_features=n
    )


FOUR, EIGHT = _make_spec(4, 32, 70, 96), _make_spec(8, 40, 33, 40, symmetric=True)
FIRST, SECOND = _make_spec(4, 32, 40, 64), _make_spec(4, 20, 64, 40)


def write_source(folder: Path) -> Path:
    """Write it, in two files: widths, a bias, act-order, experts both ways, plain tensors."""
    order = np.random.default_rng(1).permutation(96).astype(np.int32) // 32
    attention = prefix_names(Q, make_tensors(FOUR) | {"weight_g_idx": order})
    attention[f"{Q}.bias"] = np.arange(70).astype(ml_dtypes.bfloat16)
    attention |= prefix_names(f"{LAYER}.self_attn.o_proj", make_tensors(EIGHT))
    names = ("gate_proj", "up_proj", "down_proj")
    mlp = make_experts(EXPERTS, FIRST, SECOND, names=names, experts=3)
    floats = np.random.default_rng(2)
    for expert in range(2):
        for name, shape in zip(names, ((5, 6), (5, 6), (6, 5)), strict=True):
            array = floats.standard_normal(shape).astype(np.float32)
            mlp[f"model.layers.1.mlp.experts.{expert}.{name}.weight"] = array
    mlp |= {
        "model.norm.weight": np.arange(7, dtype=np.float32),
        "model.steps": np.array([2**40]),
        "scalar": np.array(2.5, np.float16),
        "empty": np.zeros((0, 3), np.int8),
        "mask": np.array([True, False]),
    }
    specs = (FOUR, EIGHT, FIRST, SECOND)
    targets = (["re:.*q_proj"], ["re:.*o_proj"], ["re:.*(gate|up)_proj"], ["re:.*down_proj"])
    config = make_config(*specs, targets=targets, version="0.17.0")
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    write_folder(folder, config, [attention, mlp])
    (folder / "tokenizer.json").write_text("{}")
    return folder


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    """Tree, kinds of arrays, dtypes, shapes, bits, specs, config and warnings are equal."""
    assert jax.tree.structure(found.params) == jax.tree.structure(expected.params)
    pairs = zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True)
    for array, other in pairs:
        assert type(array) is type(other)
        assert (array.dtype, array.shape) == (other.dtype, other.shape)
        assert np.asarray(array).tobytes() == np.asarray(other).tobytes()
    assert found.specs == expected.specs
    assert found.config == expected.config
    assert found.warnings == expected.warnings


def edit_manifest(folder: Path, edit: Callable[[dict], object], *, signed: bool = True) -> None:
    """Change the manifest, and by default its checksum too, as somebody would who means it."""
    path = folder / MANIFEST
    table = json.loads(path.read_text())
    edit(table)
    if signed and "sha256" in table:
        table["sha256"] = hash_table(table)
    path.write_text(json.dumps(table))


def refuse(folder: Path, *patterns: str) -> CheckpointError:
    """Loading is refused with one fault for each pattern, which says what to do.

    Without patterns the faults may be any.
    """
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    faults = caught.value.faults
    for pattern in patterns:
        assert any(pattern in str(fault) for fault in faults), (pattern, faults)
    assert not patterns or len(faults) == len(patterns), faults
    assert all(fault.way_out for fault in faults) or not patterns
    return caught.value
