"""The plan of a checkpoint: its modules with their specs, or one error that lists every fault."""

from __future__ import annotations

import json
from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from loaders.errors import CheckpointError
from loaders.files.safetensors_file import open_file
from loaders.plan import make_plan
from loaders.schemes.compressed_tensors import QuantizationConfig
from loaders.schemes.config_groups import Scheme
from pallas_kernels.format.spec import QuantSpec
from tests.folders import make_config, make_tensors, prefix_names, write_folder

SPEC = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=64, out_features=9)
SYMMETRIC = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=64, out_features=9)
PATH = "model.layers.0.q_proj"


def _list_faults(folder) -> list[tuple[str, str, str]]:
    with pytest.raises(CheckpointError) as caught:
        make_plan(folder)
    faults = caught.value.faults
    for fault in faults:
        assert str(fault) in str(caught.value)
    return [(fault.file, fault.tensor, fault.what) for fault in faults]


def _write(folder, tensors, spec=SPEC, **changes):
    return write_folder(folder / "c", make_config(spec, **changes), [prefix_names(PATH, tensors)])


def _without(tensors, *roles):
    return {role: array for role, array in tensors.items() if role not in roles}


def test_modules_and_plain_tensors_are_told_apart(tmp_path):
    tensors = prefix_names(PATH, make_tensors(SPEC) | {"bias": np.zeros(9, np.float16)})
    tensors |= {
        "model.norm.weight": np.ones(64, ml_dtypes.bfloat16),
        "scalar": np.array(1.0, np.float32),
    }
    tensors |= {"model.layers.0.norm.weight": np.ones(64, np.float32)}
    config = make_config(SPEC) | {"model_type": "llama"}
    plan = make_plan(str(write_folder(tmp_path / "c", config, [tensors])))
    assert plan.quantized.keys() == {PATH}
    assert plan.quantized[PATH].spec == SPEC
    assert plan.quantized[PATH].tensors.keys() == {*make_tensors(SPEC), "bias"}
    assert plan.plain.keys() == {"model.norm.weight", "scalar", "model.layers.0.norm.weight"}
    assert plan.config == config
    assert plan.nbytes == sum(array.nbytes for array in tensors.values())
    assert not plan.warnings
    order = [part.name if hasattr(part, "name") else part.path for part in plan.list_parts()]
    assert sorted(order) == sorted([PATH, *plan.plain])


def test_each_group_gives_its_own_spec(tmp_path):
    channel = QuantSpec(bits=8, group_size=-1, symmetric=True, in_features=33, out_features=5)
    config = make_config(SPEC, channel, targets=[["Linear"], ["re:.*up$"]])
    config["quantization_config"]["config_groups"]["group_1"]["weights"] |= {
        "strategy": "channel",
        "group_size": None,
    }
    shards = [prefix_names("m.q", make_tensors(SPEC)), prefix_names("m.up", make_tensors(channel))]
    plan = make_plan(write_folder(tmp_path / "c", config, shards))
    assert {path: module.spec for path, module in plan.quantized.items()} == {
        "m.q": SPEC,
        "m.up": channel,
    }


GOOD = make_tensors(SPEC)


@pytest.mark.parametrize(
    ("tensors", "role", "what"),
    [
        (_without(GOOD, "weight_packed"), "weight_packed", "the tensor is missing"),
        (_without(GOOD, "weight_scale"), "weight_scale", "the tensor is missing"),
        (_without(GOOD, "weight_shape"), "weight_shape", "the tensor is missing"),
        (_without(GOOD, "weight_zero_point"), "weight_zero_point", "the tensor is missing"),
        (GOOD | {"weight": np.ones((9, 64))}, "weight", "the tensor is not expected"),
        (
            GOOD | {"weight_packed": np.zeros((9, 9), np.int32)},
            "weight_packed",
            "expected int32 [9, 8], found int32 [9, 9]",
        ),
        (
            GOOD | {"weight_packed": np.zeros((9, 8), np.uint8)},
            "weight_packed",
            "expected int32 [9, 8], found uint8 [9, 8]",
        ),
        (
            GOOD | {"weight_scale": np.ones((9, 1), np.float32)},
            "weight_scale",
            "expected float16 or bfloat16 or float32 [9, 2], found float32 [9, 1]",
        ),
        (
            GOOD | {"weight_scale": np.ones((9, 2))},
            "weight_scale",
            "expected float16 or bfloat16 or float32 [9, 2], found float64 [9, 2]",
        ),
        (
            GOOD | {"weight_zero_point": np.zeros((9, 2), np.uint8)},
            "weight_zero_point",
            "expected int32 [2, 2], found uint8 [9, 2]",
        ),
        (
            GOOD | {"weight_shape": np.array([9, 64, 1])},
            "weight_shape",
            "expected int64 [2], found int64 [3]",
        ),
        (
            GOOD | {"weight_shape": np.array([9.0, 64.0])},
            "weight_shape",
            "expected int64 [2], found float64 [2]",
        ),
        (
            GOOD | {"weight_shape": np.array([9, 70])},
            "weight_shape",
            "must divide in_features = 70",
        ),
        (GOOD | {"weight_shape": np.array([-9, 64])}, "weight_shape", "out_features >= 1"),
        (GOOD | {"weight_shape": np.array([9, 0])}, "weight_shape", "in_features >= 1"),
        (
            GOOD | {"bias": np.zeros(8, np.float32)},
            "bias",
            "expected float16 or bfloat16 or float32 [9], found float32 [8]",
        ),
        (
            GOOD | {"bias": np.zeros(9, np.int32)},
            "bias",
            "expected float16 or bfloat16 or float32 [9], found int32 [9]",
        ),
    ],
)
def test_one_wrong_tensor_is_named_with_its_file(tmp_path, tensors, role, what):
    [(file, name, found)] = _list_faults(_write(tmp_path, tensors))
    assert (file, name) == ("model.safetensors", f"{PATH}.{role}")
    assert what in found


def test_zero_point_against_the_config_is_refused_with_the_reason(tmp_path):
    with pytest.raises(CheckpointError, match=r"zero_point: .*not expected.*config says symmetric"):
        make_plan(_write(tmp_path, GOOD, SYMMETRIC))


def test_missing_zero_point_says_that_the_config_is_asymmetric(tmp_path):
    with pytest.raises(CheckpointError, match=r"zero_point: .*missing .the config says asymmetric"):
        make_plan(_write(tmp_path, _without(GOOD, "weight_zero_point")))


def test_packed_module_that_no_target_matches_is_refused(tmp_path):
    [(_, name, what)] = _list_faults(_write(tmp_path, GOOD, ignore=[PATH]))
    assert name == PATH
    assert "no target of config_groups matches it, or it is ignored" in what
    other = write_folder(tmp_path / "none", {}, [prefix_names(PATH, GOOD)])
    assert _list_faults(other)[0][1] == "quantization_config"


def test_wrong_number_of_bits_is_a_contradiction_of_shapes(tmp_path):
    wide = QuantSpec(bits=8, group_size=32, symmetric=False, in_features=64, out_features=9)
    names = {name for _, name, _ in _list_faults(_write(tmp_path, GOOD, wide))}
    assert names == {f"{PATH}.weight_packed", f"{PATH}.weight_zero_point"}


def test_all_faults_of_all_modules_come_in_one_error(tmp_path):
    first = _without(GOOD, "weight_packed", "weight_zero_point") | {"bias": np.zeros(1, np.float32)}
    second = _without(GOOD, "weight_shape", "weight_scale") | {
        "weight_g_idx": np.zeros(64, np.int32)
    }
    third = GOOD | {"weight_scale": np.ones((9, 3), np.float32)}
    shards = [prefix_names("a", first), prefix_names("b", second), prefix_names("c", third)]
    shards[0] |= prefix_names("good", GOOD)
    found = _list_faults(write_folder(tmp_path / "c", make_config(SPEC), shards))
    one, two, three = (f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3))
    assert sorted((file, name) for file, name, _ in found) == [
        (one, "a.bias"),
        (one, "a.weight_packed"),
        (one, "a.weight_zero_point"),
        (two, "b.weight_scale"),
        (two, "b.weight_shape"),
        (three, "c.weight_scale"),
    ]


def test_faults_of_the_config_and_of_the_files_come_together(tmp_path):
    folder = _write(tmp_path, GOOD, kv_cache_scheme={"num_bits": 8})
    (folder / "model.safetensors").write_bytes(b"short")
    files = [file for file, _, _ in _list_faults(folder)]
    assert files == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("order", [("a", "a.b"), ("a.b.c", "a")])
def test_name_that_is_a_tensor_and_a_path_is_refused(tmp_path, order):
    tensors = {name: np.full(2, i, np.float32) for i, name in enumerate(order)}
    [(_, name, what)] = _list_faults(write_folder(tmp_path / "c", {}, [tensors]))
    assert name == "a"
    assert "the path of others" in what


def test_module_split_over_shards_is_one_module(tmp_path):
    names = prefix_names(PATH, GOOD)
    shards = [dict(list(names.items())[:2]), dict(list(names.items())[2:])]
    plan = make_plan(write_folder(tmp_path / "c", make_config(SPEC), shards))
    assert plan.quantized[PATH].spec == SPEC
    assert len({info.file for info in plan.quantized[PATH].tensors.values()}) == 2


def test_pattern_that_matches_nothing_is_a_warning(tmp_path):
    folder = _write(tmp_path, GOOD, ignore=["lm_head", "re:.*visual.*"])
    config = json.loads((folder / "config.json").read_text())
    for changes, count in (
        ({"tie_word_embeddings": False}, 2),
        ({"tie_word_embeddings": True}, 1),
        ({"text_config": {"tie_word_embeddings": False}}, 2),
        ({}, 1),  # the default of transformers' class, which may tie the head
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        warnings = make_plan(folder).warnings
        assert len(warnings) == count
        assert any("'lm_head' matches no module" in warning for warning in warnings) == (count == 2)


def test_folder_without_config_is_refused(tmp_path):
    folder = _write(tmp_path, GOOD)
    (folder / "config.json").unlink()
    [(file, _, what)] = _list_faults(folder)
    assert file == "config.json"
    assert "the file is missing" in what


def test_each_file_is_opened_twice_however_many_modules_there_are(tmp_path, monkeypatch):
    shards = [
        {k: v for i in range(20) for k, v in prefix_names(f"{part}.{i}", GOOD).items()}
        for part in "ab"
    ]
    folder = write_folder(tmp_path / "c", make_config(SPEC), shards)
    opened = []

    def note(path):
        opened.append(path.name)
        return open_file(path)

    monkeypatch.setattr("loaders.files.safetensors_file.open_file", note)
    assert len(make_plan(folder).quantized) == 40
    assert sorted(Counter(opened).values()) == [2, 2]


def test_targets_that_name_every_module_are_looked_up_and_not_searched(tmp_path, monkeypatch):
    """Some tools write them so; 20,000 modules would be compared with 20,000 names."""
    tensors = {k: v for i in range(40) for k, v in prefix_names(f"m.{i}", GOOD).items()}
    targets = [[f"m.{i}" for i in range(40)]]
    ignore = [f"m.{i}.gate" for i in range(40)]
    tensors |= {f"{name}.weight": np.ones(2, np.float32) for name in ignore}
    folder = write_folder(
        tmp_path / "c", make_config(SPEC, targets=targets, ignore=ignore), [tensors]
    )
    names = [*targets[0], *ignore]
    compared = []

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(self)
            return str.__eq__(self, other)

    config = QuantizationConfig(
        targets=tuple((Name(name), Scheme(4, 32, False)) for name in targets[0]),
        ignore=tuple(map(Name, ignore)),
    )
    monkeypatch.setattr("loaders.plan.parse_quantization", lambda _: (config, []))
    plan = make_plan(folder)
    assert len(plan.quantized) == 40 and not plan.warnings
    assert len(compared) < 10 * len(names)
