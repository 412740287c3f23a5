"""`quantization_config`: each field that is refused, and which scheme a module gets."""

from __future__ import annotations

import pytest

from loaders.quantization_config import Scheme, parse_quantization

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def _make_config(weights=(), group=(), **header) -> dict:
    group = {"targets": ["Linear"], "weights": WEIGHTS | dict(weights)} | dict(group)
    base = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }
    return {"quantization_config": base | header}


def _parse(config):
    parsed, faults = parse_quantization(config)
    assert not faults
    return parsed


@pytest.mark.parametrize(
    ("config", "field", "what"),
    [
        (_make_config(quant_method="gptq"), "quant_method", "found 'gptq'"),
        (_make_config(format="int-quantized"), "format", "found 'int-quantized'"),
        (_make_config(format=None), "format", "found None"),
        (_make_config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme", "not supported"),
        (_make_config(sparsity_config={"format": "sparse-24"}), "sparsity_config", "not supported"),
        (
            _make_config(transform_config={"config_groups": {"r": 1}}),
            "transform_config",
            "not supp",
        ),
        (_make_config(config_groups={}), "config_groups", "no group"),
        (_make_config(config_groups=[1]), "config_groups", "no group"),
        (_make_config(config_groups={"g": 3}), "config_groups.g", "expected an object"),
        (
            _make_config(config_groups={"W3A16": ["Linear"]}),
            "config_groups.W3A16",
            "expected an obj",
        ),
        (_make_config(ignore="lm_head"), "ignore", "found 'lm_head'"),
        (_make_config(ignore=[3]), "ignore", "found [3]"),
        (_make_config(ignore=["re:("]), "re:(", "is not a regular expression"),
        (_make_config(group={"targets": ["re:["]}), "re:[", "is not a regular expression"),
        (_make_config(group={"targets": "Linear"}), "config_groups.group_0", "list of targets"),
        (_make_config(group={"targets": None}), "config_groups.group_0", "list of targets"),
        (
            _make_config(group={"input_activations": {"num_bits": 8}}),
            "config_groups.group_0.input_activations",
            "quantized activations are not supported",
        ),
        (
            _make_config(group={"output_activations": {"num_bits": 8}}),
            "config_groups.group_0.output_activations",
            "quantized activations are not supported",
        ),
        (
            _make_config(group={"format": "marlin-24"}),
            "config_groups.group_0.format",
            "found 'marlin-24'",
        ),
        (_make_config(group={"weights": None}), "config_groups.group_0.weights", "an object"),
        ({"quantization_config": [1]}, "", "expected an object, found list"),
    ],
)
def test_field_that_is_not_supported_is_named(config, field, what):
    _, faults = parse_quantization(config)
    names = [fault.tensor for fault in faults]
    assert f"quantization_config.{field}".rstrip(".") in names
    assert any(what in fault.what for fault in faults)
    assert all(fault.file == "config.json" for fault in faults)


@pytest.mark.parametrize(
    ("weights", "field", "what"),
    [
        ({"num_bits": 3}, "num_bits", "expected 4 or 8, found 3"),
        ({"num_bits": "4"}, "num_bits", "expected 4 or 8, found '4'"),
        ({"num_bits": 4.0}, "num_bits", "expected 4 or 8, found 4.0"),
        ({"num_bits": None}, "num_bits", "found None"),
        ({"type": "float"}, "type", "expected 'int', found 'float'"),
        ({"dynamic": True}, "dynamic", "expected False, found True"),
        ({"dynamic": "local"}, "dynamic", "expected False, found 'local'"),
        ({"block_structure": [128, 128]}, "block_structure", "found [128, 128]"),
        ({"actorder": "group"}, "actorder", "activation order 'group' is not supported yet"),
        ({"actorder": True}, "actorder", "activation order True is not supported yet"),
        ({"strategy": "tensor", "group_size": None}, "strategy", "found 'tensor'"),
        ({"strategy": None, "group_size": None}, "strategy", "found 'tensor'"),
        ({"strategy": "block"}, "strategy", "found 'block'"),
        ({"strategy": "token"}, "strategy", "found 'token'"),
        ({"strategy": "tensor_group"}, "strategy", "found 'tensor_group'"),
        ({"strategy": ["group"]}, "strategy", "found ['group']"),
        ({"group_size": None}, "group_size", "None contradicts strategy 'group'"),
        ({"group_size": -1}, "group_size", "-1 contradicts strategy 'group'"),
        ({"strategy": "channel"}, "group_size", "32 contradicts strategy 'channel'"),
        ({"strategy": None, "group_size": "32"}, "group_size", "found '32'"),
        ({"strategy": None, "group_size": 32.0}, "group_size", "found 32.0"),
        ({"strategy": None, "group_size": True}, "group_size", "found True"),
        ({"strategy": None, "group_size": 0}, "group_size", "found 0"),
        ({"strategy": None, "group_size": -2}, "group_size", "found -2"),
        ({"symmetric": None}, "symmetric", "expected true or false, found None"),
        ({"symmetric": 0}, "symmetric", "expected true or false, found 0"),
    ],
)
def test_weights_that_are_not_supported_are_named(weights, field, what):
    _, [fault] = parse_quantization(_make_config(weights))
    assert fault.tensor == f"quantization_config.config_groups.group_0.weights.{field}"
    assert what in fault.what


def test_all_faults_of_all_groups_are_listed():
    groups = {
        "a": {"targets": ["Linear"], "weights": WEIGHTS | {"num_bits": 2, "dynamic": True}},
        "b": {
            "targets": ["x"],
            "weights": WEIGHTS | {"group_size": 0},
            "input_activations": {"n": 1},
        },
    }
    config = _make_config(config_groups=groups, kv_cache_scheme={"num_bits": 8}, ignore=["re:("])
    fields = {fault.tensor.partition(".")[2] for fault in parse_quantization(config)[1]}
    assert fields == {
        "kv_cache_scheme",
        "config_groups.a.weights.num_bits",
        "config_groups.a.weights.dynamic",
        "config_groups.b.input_activations",
        "config_groups.b.weights.group_size",
        "re:(",
    }


@pytest.mark.parametrize(
    ("weights", "scheme"),
    [
        ({}, Scheme(4, 32, True)),
        ({"num_bits": 8, "symmetric": False}, Scheme(8, 32, False)),
        ({"strategy": "channel", "group_size": None}, Scheme(4, -1, True)),
        ({"strategy": "channel", "group_size": -1}, Scheme(4, -1, True)),
        ({"strategy": None, "group_size": 128}, Scheme(4, 128, True)),
        ({"strategy": None, "group_size": -1}, Scheme(4, -1, True)),
        ({"actorder": "weight", "dynamic": None, "type": None}, Scheme(4, 32, True)),
        ({"actorder": "static"}, Scheme(4, 32, True)),
        ({"actorder": False}, Scheme(4, 32, True)),
    ],
)
def test_supported_weights_are_read(weights, scheme):
    assert _parse(_make_config(weights)).find_scheme("m") == scheme


def test_old_files_full_of_nulls_are_read():
    group = {"input_activations": None, "output_activations": None, "format": None}
    weights = {"actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax"}
    header = {"ignore": None, "kv_cache_scheme": None, "sparsity_config": {"format": "dense"}}
    header |= {"transform_config": {}, "quantization_status": "frozen"}
    assert _parse(_make_config(weights, group, **header)).find_scheme("m") == Scheme(4, 32, True)
    raw = _make_config(weights, group)["quantization_config"]
    assert _parse({"compression_config": raw}).find_scheme("m") == Scheme(4, 32, True)


def test_a_checkpoint_that_is_not_quantized_has_no_scheme():
    assert _parse({}).find_scheme("m") is None
    assert _parse({"quantization_config": None}).find_scheme("m") is None


MODULES = (
    "model.layers.0.mlp.up_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.10.q",
    "lm_head",
)


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        ([["Linear"]], []),
        ([["Linear"]], ["lm_head"]),
        ([["Linear"]], ["re:model.layers.1"]),
        ([["Linear"]], ["Linear"]),
        ([["Linear"], ["re:.*up_proj"], ["model.layers.1.mlp.up_proj"]], []),
        ([["model.layers.1.mlp.up_proj"], ["re:.*up_proj"], ["Linear"]], ["re:.*head$"]),
        ([["re:model", "lm_head"], ["re:.*up_proj", "Linear"]], []),
        ([["re:.*up_proj"], ["re:.*layers.0.*"]], []),
        ([["re:.*layers.0.*"], ["re:.*up_proj"]], []),
        ([["re:up_proj"], ["re:.*q$"]], []),
        ([["Linear"], ["Linear"]], []),
        ([["re:.*q"], ["lm_head"], ["re:.*q"]], []),
        ([["model.layers.1"], ["Embedding"], ["re:model.layers.1.*"]], ["model.layers.10.q"]),
        ([["linear"], ["re:.*mlp"]], []),
    ],
)
def test_scheme_is_the_one_that_compressed_tensors_applies(targets, ignore):
    torch = pytest.importorskip("torch")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    groups = {
        f"group_{i}": {"targets": names, "weights": WEIGHTS | {"group_size": 2 ** (i + 1)}}
        for i, names in enumerate(targets)
    }
    config = _make_config(config_groups=groups, ignore=ignore)
    model = torch.nn.Module()
    for path in MODULES:
        *parents, leaf = path.split(".")
        module = model
        for name in parents:
            if not hasattr(module, name):
                module.add_module(name, torch.nn.Module())
            module = getattr(module, name)
        module.add_module(leaf, torch.nn.Linear(8, 2, bias=False))
    reference = quantization.QuantizationConfig.model_validate(config["quantization_config"])
    quantization.apply_quantization_config(model, reference, show_progress=False)
    parsed = _parse(config)
    for path in MODULES:
        expected = getattr(model.get_submodule(path), "quantization_scheme", None)
        size = None if expected is None else expected.weights.group_size
        found = parsed.find_scheme(path)
        assert (None if found is None else found.group_size) == size, path


@pytest.mark.parametrize("name", ["W4A16", "w4a16", "W4A16_ASYM", "W8A16"])
def test_presets_are_those_of_compressed_tensors(name):
    schemes = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    expected = schemes.preset_name_to_scheme(name, ["Linear"]).weights
    found = _parse(_make_config(config_groups={name: ["Linear"]})).find_scheme("m")
    assert found == Scheme(expected.num_bits, expected.group_size, expected.symmetric)
