"""Experts become stacks: the bits of each expert, whatever the files look like."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from loaders.errors import CheckpointError
from loaders.files.host_memory import make_zeros
from loaders.modules.repack import _pack_expert, encode, pack, pack_expert, write_rows
from loaders.plan import make_plan
from loaders.stream import load_params
from pallas_kernels.format.dequantize import dequantize
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import check_weights, make_abstract
from tests.checkpoints import (
    assert_same_bits,
    compress,
    decompress,
    make_args,
    make_weight,
    to_numpy,
    write_folder,
)
from tests.folders import make_config, make_experts, make_tensors
from tests.folders import write_folder as write_arrays
from tests.grids import cover

EXPERTS, HIDDEN = 3, 128
PATH = "model.layers.0.mlp.experts"
USUAL = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")


def make_spec(bits, group, symmetric, n, k) -> QuantSpec:
    return QuantSpec(
        bits=bits, group_size=group, symmetric=symmetric, in_features=k, out_features=n
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """Experts [I, H] and [H, I]: bits, group and symmetry of both products."""

    inner: int
    first: tuple[int, int, bool]
    second: tuple[int, int, bool]
    names: tuple[str, ...] = USUAL
    scale_dtype: str = "bfloat16"

    @property
    def specs(self) -> tuple[QuantSpec, QuantSpec]:
        """Of the stacks."""
        rows = self.inner * (len(self.names) - 1)
        return (
            make_spec(*self.first, rows, HIDDEN),
            make_spec(*self.second, HIDDEN, self.inner),
        )

    @property
    def args(self):
        return [make_args(spec, self.scale_dtype) for spec in self.specs]

    def make_weights(self, expert: int) -> list[torch.Tensor]:
        """Gate, up and down of one expert."""
        shapes = [*[(self.inner, HIDDEN)] * (len(self.names) - 1), (HIDDEN, self.inner)]
        return [make_weight(shape, 10 * expert + i) for i, shape in enumerate(shapes)]


CASES = [
    Case(96, (4, 32, False), (4, 32, False)),
    Case(64, (4, 128, True), (8, 32, False)),
    Case(40, (8, -1, False), (4, -1, True), MIXTRAL, "float16"),
    Case(40, (4, 128, False), (8, 8, True), scale_dtype="float32"),
    # 4 * 36 and 4 * 29 bits do not fill words of 32
    Case(36, (4, 32, False), (4, 12, False)),
    Case(29, (4, 64, False), (8, -1, False), MIXTRAL),
    Case(64, (8, 32, True), (4, 64, False), USUAL[1:]),
    Case(67, (8, -1, True), (8, -1, True), USUAL[1:], "float32"),
]


@pytest.mark.parametrize(("case", "shards"), cover(CASES, [1, 4]))
def test_every_expert_has_the_bits_of_its_concatenated_projections(tmp_path, case, shards):
    weights = [case.make_weights(expert) for expert in range(EXPERTS)]
    first, second = case.args
    modules = {
        f"{PATH}.{expert}.{name}": (compress(weight, args), args)
        for expert in range(EXPERTS)
        for name, weight in zip(case.names, weights[expert], strict=True)
        for args in [second if name == case.names[-1] else first]
    }
    folder = write_folder(tmp_path / "c", modules, shards=shards)
    plan = make_plan(folder)
    params = load_params(plan)
    stacks = params["model"]["layers"]["0"]["mlp"]["experts"]
    assert stacks.keys() == {"w13", "w2"}
    spec13, spec2 = case.specs
    assert plan.specs == {f"{PATH}.w13": spec13, f"{PATH}.w2": spec2}
    leaves = plan.describe_leaves()
    for name, spec, args in (("w13", spec13, first), ("w2", spec2, second)):
        check_weights(stacks[name], spec, EXPERTS)
        for leaf, array in stacks[name].items():
            described = leaves.pop(f"{PATH}.{name}.{leaf}")
            assert (described.shape, described.dtype) == (array.shape, array.dtype)
        for expert, (*rows, down) in enumerate(weights):
            parts = rows if name == "w13" else [down]
            joined = {k: to_numpy(t) for k, t in compress(torch.cat(parts), args).items()}
            found = {leaf: array[expert] for leaf, array in stacks[name].items()}
            expected = pack(joined, spec)
            assert found.keys() == expected.keys()
            for leaf, array in expected.items():
                assert_same_bits(found[leaf], array)
            dense = torch.cat([decompress(compress(part, args), args) for part in parts])
            assert_same_bits(dequantize(found, spec), dense)
    assert not leaves


def _load(tmp_path, tensors, config=None, **options):
    plan = make_plan(write_arrays(tmp_path / "c", config or {}, [tensors]))
    params = load_params(plan, **options)
    described = plan.describe_leaves()
    for path in plan.stacks:
        node = params
        for key in path.split("."):
            node = node[key]
        for leaf, array in node.items():
            assert described[f"{path}.{leaf}"].shape == array.shape
    return params["model"]["layers"]["0"]["mlp"]["experts"]


def _make_floats(names, dtype=np.float32) -> dict[str, np.ndarray]:
    return {
        f"{PATH}.{expert}.{name}.weight": to_numpy(weight).astype(dtype)
        for expert in range(EXPERTS)
        for name, weight in zip(names, Case(29, (), (), names).make_weights(expert), strict=True)
    }


def _stack(tensors, name, role="weight"):
    return np.stack([tensors[f"{PATH}.{expert}.{name}.{role}"] for expert in range(EXPERTS)])


@pytest.mark.parametrize("names", [USUAL, MIXTRAL, USUAL[1:]])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_float_experts_are_stacked_as_they_are(tmp_path, names, dtype):
    tensors = _make_floats(names, dtype)
    experts = _load(tmp_path, tensors)
    assert experts.keys() == {"w13", "w2"}
    assert experts["w13"].keys() == experts["w2"].keys() == {"weight"}
    rows = np.concatenate([_stack(tensors, name) for name in names[:-1]], axis=1)
    assert_same_bits(experts["w13"]["weight"], rows)
    assert_same_bits(experts["w2"]["weight"], _stack(tensors, names[-1]))


def test_biases_are_stacked_and_cast_with_the_floats(tmp_path):
    spec, down = make_spec(4, 32, False, 29, 64), make_spec(8, 29, True, 64, 29)
    tensors = make_experts(PATH, spec, down, names=USUAL, experts=EXPERTS)
    for expert in range(EXPERTS):
        for i, (name, n) in enumerate(zip(USUAL, (29, 29, 64), strict=True)):
            bias = make_weight((1, n), 10 * expert + i)[0].numpy()
            tensors[f"{PATH}.{expert}.{name}.bias"] = bias
    config = make_config(spec, down, targets=[["Linear"], [r"re:.*down_proj$"]])
    experts = _load(tmp_path, tensors, config, dtype=jnp.float16)
    rows = [_stack(tensors, name, "bias").astype(np.float16) for name in USUAL]
    assert_same_bits(experts["w13"]["bias"], np.concatenate(rows[:2], axis=1))
    assert_same_bits(experts["w2"]["bias"], rows[2])
    assert experts["w13"]["scale"].dtype == jnp.float32
    tensors[f"{PATH}.1.up_proj.bias"][3] = 1e6
    tensors[f"{PATH}.2.down_proj.weight_scale"][5] = 0
    with pytest.raises(CheckpointError) as caught:
        _load(tmp_path, tensors, config, dtype=jnp.float16)
    names = [fault.tensor for fault in caught.value.faults]
    assert names == [f"{PATH}.1.up_proj.bias", f"{PATH}.2.down_proj.weight_scale"]


def test_floats_are_cast_one_by_one_and_overflows_named(tmp_path):
    tensors = _make_floats(USUAL)
    experts = _load(tmp_path, tensors, dtype=jnp.bfloat16)
    expected = _stack(tensors, "down_proj").astype(ml_dtypes.bfloat16)
    assert_same_bits(experts["w2"]["weight"], expected)
    tensors[f"{PATH}.1.gate_proj.weight"][2, 7] = 1e6
    with pytest.raises(CheckpointError) as caught:
        _load(tmp_path, tensors, dtype=jnp.float16)
    [fault] = caught.value.faults
    assert (fault.tensor, fault.what) == (
        f"{PATH}.1.gate_proj.weight",
        f"1 of {29 * HIDDEN} values are too large for float16",
    )


def test_stack_is_filled_where_it_lies():
    """Neither does the compiled program hold a copy, nor does the array move."""
    spec = make_spec(4, 32, False, 40, 256)
    stacked = dataclasses.replace(spec, out_features=80)
    stack = {
        name: jnp.zeros(leaf.shape, leaf.dtype)
        for name, leaf in make_abstract(stacked, jnp.bfloat16, experts=64).items()
    }
    size = sum(leaf.nbytes for leaf in stack.values())
    tensors = make_tensors(spec, scale_dtype=jnp.bfloat16)
    del tensors["weight_shape"]
    words = {role: a.view(np.uint32) if a.dtype == np.int32 else a for role, a in tensors.items()}
    compiled = _pack_expert.lower(stack, words, 5, spec, 40, encode(spec)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == size
    # codes as bytes, before and after they are padded to tiles
    assert memory.temp_size_in_bytes <= 2 * 128 * 256 < size / 8
    addresses = {name: leaf.unsafe_buffer_pointer() for name, leaf in stack.items()}
    filled = pack_expert(stack, tensors, spec, 5, 40)
    assert {name: leaf.unsafe_buffer_pointer() for name, leaf in filled.items()} == addresses
    assert all(leaf.is_deleted() for leaf in stack.values())
    floats = jnp.zeros((64, 80, 256))
    address = floats.unsafe_buffer_pointer()
    assert write_rows(floats, np.ones((40, 256), np.float32), 5, 40).unsafe_buffer_pointer() == (
        address
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_stack_on_the_host_is_filled_as_one_on_a_device(symmetric):
    """Rows 0 to 39 are gate's and 40 to 79 up's: they share a tile."""
    spec = make_spec(4, 32, symmetric, 40, 256)
    leaves = make_abstract(dataclasses.replace(spec, out_features=80), jnp.bfloat16, experts=3)
    on_host = {name: make_zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    on_device = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    held = dict(on_host)
    for seed, row in enumerate((0, 40)):
        tensors = make_tensors(spec, scale_dtype=jnp.bfloat16, seed=seed)
        del tensors["weight_shape"]
        on_host = pack_expert(on_host, tensors, spec, 1, row)
        on_device = pack_expert(on_device, tensors, spec, 1, row)
    for name, leaf in on_device.items():
        assert on_host[name] is held[name]
        assert_same_bits(on_host[name], leaf)
        assert on_host[name][1].any() and not on_host[name][[0, 2]].any()


@pytest.mark.parametrize("size", [1000, 5_000_001])
def test_zeros_of_the_host_are_taken_without_a_copy(size):
    zeros = make_zeros((size,), np.int8)
    assert jax.device_put(zeros).unsafe_buffer_pointer() == zeros.ctypes.data
