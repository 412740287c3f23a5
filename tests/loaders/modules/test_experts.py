"""Experts in a plan: which are missing, which do not go together, and how many there are."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from loaders.errors import CheckpointError
from loaders.modules.experts import name_separately, split_name
from loaders.plan import make_plan
from pallas_kernels.format.spec import QuantSpec
from tests.folders import make_config, make_experts, make_tensors, prefix_names, write_folder

FIRST = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=64, out_features=40)
SECOND = QuantSpec(bits=8, group_size=8, symmetric=True, in_features=40, out_features=64)
USUAL = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")
PATH = "model.layers.0.mlp.experts"
TARGETS = (("Linear",), (r"re:.*\.(down_proj|w2)$",))


def _make_experts(path=PATH, names=USUAL, experts=3):
    return make_experts(path, FIRST, SECOND, names=names, experts=experts)


def _write(tmp_path, tensors, **config):
    described = make_config(FIRST, SECOND, targets=TARGETS) | config
    return write_folder(tmp_path / "c", described, [tensors])


def _list_faults(folder) -> list[tuple[str, str]]:
    with pytest.raises(CheckpointError) as caught:
        make_plan(folder)
    for fault in caught.value.faults:
        assert str(fault) in str(caught.value)
    return [(fault.tensor, fault.what) for fault in caught.value.faults]


def _without(tensors, *prefixes):
    return {name: a for name, a in tensors.items() if not name.startswith(prefixes)}


def _make_floats(names=USUAL, experts=3, dtype=np.float32, path=PATH):
    shapes = {name: (40, 64) for name in names[:-1]} | {names[-1]: (64, 40)}
    return {
        f"{path}.{expert}.{name}.weight": np.full(shape, expert, dtype)
        for expert in range(experts)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("names", [USUAL, MIXTRAL, USUAL[1:]])
def test_experts_are_stacks_and_their_members_modules(tmp_path, names):
    plan = make_plan(_write(tmp_path, _make_experts(names=names)))
    rows = 40 * (len(names) - 1)
    first = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=64, out_features=rows)
    assert plan.specs == {f"{PATH}.w13": first, f"{PATH}.w2": SECOND}
    assert plan.quantized.keys() == {f"{PATH}.{e}.{name}" for e in range(3) for name in names}
    assert {stack.experts for stack in plan.stacks.values()} == {3}
    up = f"{PATH}.2.{names[-2]}"
    assert plan.stacks[f"{PATH}.w13"].places[up] == (2, rows - 40)
    assert set(plan.describe_leaves()) == {
        *(f"{PATH}.w13.{leaf}" for leaf in ("packed", "scale", "zero_point")),
        *(f"{PATH}.w2.{leaf}" for leaf in ("packed", "scale")),
    }


def test_every_missing_expert_of_every_layer_is_in_one_error(tmp_path):
    paths = [f"model.layers.{i}.mlp.experts" for i in range(3)]
    tensors = {k: v for path in paths for k, v in _make_experts(path, experts=6).items()}
    gone = [f"{paths[0]}.{i}." for i in (0, 2, 3)] + [f"{paths[2]}.5."]
    assert _list_faults(_write(tmp_path, _without(tensors, *gone), num_experts=6)) == [
        (paths[0], "3 of 6 experts are missing: 0,2-3"),
        (paths[2], "1 of 6 experts are missing: 5"),
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"num_experts": 4},
        {"num_local_experts": 4, "num_experts": None},
        {"n_routed_experts": 4, "num_experts": 0},
        {"text_config": {"num_experts": 4}},
        {"llm_config": {"num_experts": 4}},
        {"text_config": {"num_local_experts": 4}, "num_local_experts": 4},
    ],
)
def test_config_says_how_many_experts_there_are(tmp_path, config):
    folder = _write(tmp_path, _make_experts(experts=3), **config)
    assert _list_faults(folder) == [(PATH, "1 of 4 experts are missing: 3")]


def test_without_a_number_the_last_expert_counts(tmp_path):
    tensors = _make_experts(experts=4)
    folder = _write(tmp_path, _without(tensors, f"{PATH}.3."), text_config=None)
    assert make_plan(folder).stacks[f"{PATH}.w2"].experts == 3
    folder = _write(tmp_path, _without(tensors, f"{PATH}.1."))
    assert _list_faults(folder) == [(PATH, "1 of 4 experts are missing: 1")]


def test_experts_beyond_the_number_of_the_config_are_refused(tmp_path):
    folder = _write(tmp_path, _make_experts(experts=4), num_experts=2)
    [(path, what)] = _list_faults(folder)
    assert (path, what) == (PATH, "expected the 2 experts of config.json, found also 2-3")


def test_numbers_of_experts_that_contradict_each_other_are_refused(tmp_path):
    config = {"num_experts": 3, "text_config": {"num_local_experts": 4}}
    [(_, what)] = _list_faults(_write(tmp_path, _make_experts(), **config))
    assert what == "contradict each other: num_experts = 3, text_config.num_local_experts = 4"
    assert make_plan(_write(tmp_path, {"norm.weight": np.ones(3)}, **config))


@pytest.mark.parametrize("names", [USUAL, MIXTRAL])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_missing_projection_is_named_with_its_experts(tmp_path, names, position):
    name = names[position]
    gone = (f"{PATH}.0.{name}.", f"{PATH}.2.{name}.")
    folder = _write(tmp_path, _without(_make_experts(names=names), *gone))
    assert _list_faults(folder) == [(PATH, f"{name} is missing in experts 0,2")]


def test_gate_without_any_up_and_up_without_any_down_are_refused(tmp_path):
    tensors = _make_experts()
    folder = _write(tmp_path, _without(tensors, *(f"{PATH}.{e}.up_proj." for e in range(3))))
    assert _list_faults(folder) == [(PATH, "up_proj is missing in experts 0-2")]
    folder = _write(tmp_path, _without(tensors, *(f"{PATH}.{e}.down_proj." for e in range(3))))
    assert _list_faults(folder) == [(PATH, "down_proj is missing in experts 0-2")]


def test_a_fault_of_a_member_is_not_also_a_missing_expert(tmp_path):
    tensors = _without(_make_experts(), f"{PATH}.1.up_proj.weight_scale")
    [(name, what)] = _list_faults(_write(tmp_path, tensors))
    assert (name, what) == (f"{PATH}.1.up_proj.weight_scale", "the tensor is missing")


WIDE = QuantSpec(bits=8, group_size=32, symmetric=False, in_features=64, out_features=40)
TEXT = "W4 g32 asym [40, 64] with float32 scales"


def _replace(tensors, path, spec, **options):
    return _without(tensors, f"{path}.") | prefix_names(path, make_tensors(spec, **options))


def _list_floats(folder) -> dict[str, str]:
    """Path -> dtype of each stack that holds floats, and a warning about each."""
    plan = make_plan(folder)
    stacks = {path: stack for path, stack in plan.stacks.items() if stack.spec is None}
    for path in stacks:
        assert any(warning.startswith(f"{path}: ") for warning in plan.warnings)
        assert path not in plan.specs
    return {path: stack.leaves["weight"].dtype.name for path, stack in stacks.items()}


def test_gate_and_up_of_different_schemes_are_floats(tmp_path):
    tensors = _make_experts()
    for expert in range(3):
        tensors = _replace(tensors, f"{PATH}.{expert}.up_proj", WIDE)
    config = make_config(FIRST, SECOND, WIDE, targets=[*TARGETS, [r"re:.*up_proj$"]])
    folder = write_folder(tmp_path / "c", config, [tensors])
    assert _list_floats(folder) == {f"{PATH}.w13": "float32"}
    assert make_plan(folder).expanded == {
        f"{PATH}.{e}.{name}" for e in range(3) for name in ("gate_proj", "up_proj")
    }


def test_expert_of_another_shape_is_named(tmp_path):
    narrow = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=64, out_features=32)
    tensors = _replace(_make_experts(), f"{PATH}.2.up_proj", narrow)
    [(_, what)] = _list_faults(_write(tmp_path, tensors))
    assert what == (
        f"the experts of one product must have the same shape and bias, found {TEXT} in gate_proj "
        "of experts 0-2, up_proj of experts 0-1; "
        "W4 g32 asym [32, 64] with float32 scales in up_proj of experts 2"
    )


def test_floats_of_several_dtypes_have_one_that_holds_them_all(tmp_path):
    path = f"{PATH}.1.down_proj"
    half = _replace(_make_experts(), path, SECOND, scale_dtype=ml_dtypes.bfloat16)
    assert _list_floats(_write(tmp_path, half)) == {f"{PATH}.w2": "float32"}
    floats = _make_floats(dtype=np.float16)
    floats[f"{path}.weight"] = floats[f"{path}.weight"].astype(ml_dtypes.bfloat16)
    leaves = make_plan(write_folder(tmp_path / "floats", {}, [floats])).describe_leaves()
    assert leaves[f"{PATH}.w13.weight"].dtype == np.float16
    assert leaves[f"{PATH}.w2.weight"].dtype == np.float32


def test_bias_of_some_experts_or_of_several_dtypes_is_refused(tmp_path):
    tensors = _make_experts()
    some = {f"{PATH}.0.gate_proj.bias": np.zeros(40, np.float16)}
    [(_, what)] = _list_faults(_write(tmp_path, tensors | some))
    assert "scales and float16 bias in gate_proj of experts 0" in what
    dtypes = [np.float16, np.float16, np.float32]
    biases = {f"{PATH}.{e}.down_proj.bias": np.zeros(64, dtypes[e]) for e in range(3)}
    [(_, what)] = _list_faults(_write(tmp_path, tensors | biases))
    assert "scales and float32 bias in down_proj of experts 2" in what


def test_float_down_projections_beside_quantized_gates_work(tmp_path):
    floats = {k: v for k, v in _make_floats().items() if "down_proj" in k}
    quantized = {k: v for k, v in _make_experts().items() if "down_proj" not in k}
    plan = make_plan(_write(tmp_path, floats | quantized, ignore=["re:.*down_proj"]))
    assert plan.stacks[f"{PATH}.w2"].spec is None
    assert plan.specs.keys() == {f"{PATH}.w13"}


@pytest.mark.parametrize(
    ("name", "array", "what"),
    [
        ("weight", np.zeros((40, 64)), "found weight float64 [40, 64]"),
        ("weight", np.zeros((40, 64), np.int8), "found weight int8 [40, 64]"),
        ("weight", np.zeros(40, np.float32), "found weight float32 [40]"),
        ("bias", np.zeros(41, np.float32), "found bias float32 [41], weight float32 [40, 64]"),
        ("input_scale", np.zeros((), np.float32), "found input_scale float32 [], weight float32"),
    ],
)
def test_floats_that_are_no_weight_of_an_expert_are_refused(tmp_path, name, array, what):
    tensors = _make_floats() | {f"{PATH}.1.up_proj.{name}": array}
    faults = dict(_list_faults(write_folder(tmp_path / "c", {}, [tensors])))
    assert what in faults[f"{PATH}.1.up_proj"]


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({f"{PATH}.w13.weight": np.zeros(3, np.float32)}, f"{PATH}.w13.weight"),
        ({f"{PATH}.w2": np.zeros(3, np.float32)}, f"{PATH}.w2"),
        ({f"{PATH}.w2.inner.scale": np.zeros(3, np.float32)}, f"{PATH}.w2.inner.scale"),
    ],
)
def test_tensor_where_a_stack_goes_is_refused(tmp_path, extra, name):
    faults = _list_faults(_write(tmp_path, _make_experts() | extra))
    assert faults == [(name, "lies at the path of the experts' stack")]


def test_two_names_for_one_place_are_refused(tmp_path):
    tensors = _make_experts()
    again = prefix_names(f"{PATH}.1.w1", make_tensors(FIRST))
    [(name, what)] = _list_faults(_write(tmp_path, tensors | again))
    assert {name, what.rpartition(" ")[2]} == {f"{PATH}.1.w1", f"{PATH}.1.gate_proj"}
    joint = prefix_names(f"{PATH}.1.gate_up_proj", make_tensors(FIRST))
    [(path, what)] = _list_faults(_write(tmp_path, tensors | joint))
    assert path == PATH
    assert what == (
        "gate and up are one tensor in experts 1, and tensors of their own in experts 0-2"
    )


def test_products_that_do_not_fit_each_other_are_refused(tmp_path):
    floats = _make_floats()
    floats |= {f"{PATH}.{e}.down_proj.weight": np.zeros((64, 80), np.float32) for e in range(3)}
    [(path, what)] = _list_faults(write_folder(tmp_path / "c", {}, [floats]))
    assert path == PATH
    assert what == "expected [2I, H] and [H, I] in each expert, found [80, 64] and [64, 80]"


def test_experts_are_looked_for_under_their_own_name_only(tmp_path):
    floats = {
        "model.layers.0.mlp.shared_experts.gate_proj.weight": np.zeros((4, 8), np.float32),
        "model.layers.0.experts.act.0.weight": np.zeros(4, np.float32),
        "model.layers.0.experts.gate_proj.weight": np.zeros((4, 8), np.float32),
        "model.layers.0.my_experts.0.up_proj.weight": np.zeros((4, 8), np.float32),
    }
    plan = make_plan(write_folder(tmp_path / "c", {"num_experts": 8}, [floats]))
    assert not plan.stacks
    assert plan.plain.keys() == floats.keys()


@pytest.mark.parametrize(
    ("name", "path", "role"),
    [
        ("a.experts.gate_up_proj_packed", "a.experts.gate_up_proj", "weight_packed"),
        ("experts.down_proj_scale", "experts.down_proj", "weight_scale"),
        ("a.experts.down_proj_zero_point", "a.experts.down_proj", "weight_zero_point"),
        ("a.experts.up_proj_shape", "a.experts.up_proj", "weight_shape"),
        ("a.experts.down_proj_g_idx", "a.experts.down_proj", "weight_g_idx"),
        ("a.experts.gate_up_proj_bias", "a.experts.gate_up_proj", "bias"),
        ("a.experts.gate_up_proj", "a.experts.gate_up_proj", "weight"),
        ("a.experts.gate_up_proj.weight_packed", "a.experts.gate_up_proj", "weight_packed"),
        ("a.experts.0.gate_proj.weight", "a.experts.0.gate_proj", "weight"),
        ("a.my_experts.gate_up_proj_packed", "a.my_experts", "gate_up_proj_packed"),
        ("scalar", "", "scalar"),
    ],
)
def test_names_are_a_module_and_a_role(name, path, role):
    assert split_name(name) == (path, role)


def test_slices_of_stacked_experts_have_separate_names():
    gate_up = [f"a.experts.3.{name}.weight" for name in ("gate_proj", "up_proj")]
    assert name_separately("a.experts.gate_up_proj[3]") == gate_up
    assert name_separately("experts.down_proj_bias[12]") == ["experts.12.down_proj.bias"]
    granite = "a.block_sparse_moe.input_linear.weight[3]"
    assert name_separately(granite) == [n.replace("a.", "a.block_sparse_moe.") for n in gate_up]
    assert name_separately("a.experts.3.gate_proj.weight") == ["a.experts.3.gate_proj.weight"]


def test_absurd_numbers_of_experts_are_only_faults(tmp_path):
    for count in (10_001, 10**12, 10**4000):
        folder = _write(tmp_path, _make_experts(), num_experts=count)
        assert _list_faults(folder) == [("num_experts", "more than 10000 experts")]
    far = {f"{PATH}.999999.up_proj.weight": np.zeros((40, 64), np.float32)}
    assert (PATH, "999996 of 1000000 experts are missing: 3-999998") in _list_faults(
        _write(tmp_path, _make_experts() | far)
    )
    longer = {f"{PATH}.{'9' * 400}.up_proj.weight": np.zeros((40, 64), np.float32)}
    faults = _list_faults(_write(tmp_path, _make_experts() | longer))
    assert {path for path, _ in faults} == {PATH}
    assert any(f"gate_proj is missing in experts {'9' * 400}" in what for _, what in faults)
