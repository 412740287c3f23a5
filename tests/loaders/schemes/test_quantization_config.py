"""`quantization_config`: each field that is refused, and which scheme a module gets."""

from __future__ import annotations

import numpy as np
import pytest

from loaders.files.safetensors_file import TensorInfo
from loaders.schemes.compressed_tensors import QuantizationConfig
from loaders.schemes.config_groups import Scheme
from loaders.schemes.module_names import describe_modules, list_prefixes, name_classes
from loaders.schemes.quantization_config import parse_quantization

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
    assert not faults and isinstance(parsed, QuantizationConfig)
    return parsed


def _store(tmp_path, *names, shape=(8, 8), dtype="f4") -> dict:
    """Tensors by module and role, of full names."""
    modules: dict = {}
    for name in names:
        path, _, role = name.rpartition(".")
        info = TensorInfo(name, tmp_path / "model.safetensors", np.dtype(dtype), shape, 0)
        modules.setdefault(path, {})[role] = info
    return modules


@pytest.mark.parametrize(
    ("config", "field", "what"),
    [
        (_make_config(quant_method="hqq"), "quant_method", "found 'hqq'"),
        (_make_config(quant_method=8), "quant_method", "found 8"),
        ({"quantization_config": {"bits": 4}}, "quant_method", "found None"),
        (_make_config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme", "changes results"),
        (_make_config(kv_cache_scheme={}), "kv_cache_scheme", "changes results"),
        (_make_config(sparsity_config={"format": "sparse-24"}), "sparsity_config", "not supported"),
        (_make_config(sparsity_config=[1]), "sparsity_config", "not supported"),
        (_make_config(transform_config={"config_groups": {"r": 1}}), "transform_config", "not sup"),
        (_make_config(transform_config="R1"), "transform_config", "not supported"),
        (_make_config(moe_sparsity_config={"method": "prune"}), "moe_sparsity_config", "experts"),
        (_make_config(config_groups=[1]), "config_groups", "an object, found list"),
        (_make_config(config_groups={"g": 3}), "config_groups.g", "expected an object"),
        (_make_config(config_groups={"W4A16": [3]}), "config_groups.W4A16", "expected an object"),
        (_make_config(ignore="lm_head"), "ignore", "found 'lm_head'"),
        (_make_config(ignore=[3]), "ignore", "found [3]"),
        (_make_config(ignore=["re:("]), "", "'re:(' is not a regular expression"),
        (_make_config(ignore=["re:a{9999999999}"]), "", "is not a regular expression"),
        (_make_config(ignore=["re:" + "(" * 9999 + ")" * 9999]), "", "not a regular expression"),
        (_make_config(group={"targets": ["re:["]}), "", "'re:[' is not a regular expression"),
        (_make_config(group={"targets": "Linear"}), "config_groups.group_0", "list of targets"),
        (_make_config(group={"targets": None}), "config_groups.group_0", "list of targets"),
        ({"quantization_config": [1]}, "", "expected an object, found list"),
    ],
)
def test_field_that_holds_for_all_modules_is_named(config, field, what):
    _, [fault] = parse_quantization(config)
    assert fault.tensor == f"quantization_config.{field}".rstrip(".")
    assert what in fault.what and fault.file == "config.json" and fault.way_out


@pytest.mark.parametrize(
    ("config", "field", "what"),
    [
        (_make_config(format="int-quantized"), "format", "found 'int-quantized'"),
        (_make_config(format=["x"]), "format", "found ['x']"),
        (
            _make_config(config_groups={"W9A16": ["Linear"]}),
            "config_groups.W9A16",
            "'W9A16' is no preset",
        ),
        (
            _make_config(group={"input_activations": {"num_bits": 8}}),
            "config_groups.group_0.input_activations",
            "quantized activations are not supported",
        ),
        (
            _make_config(group={"input_activations": {}}),
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
        (
            _make_config(group={"format": "mixed-precision"}),
            "config_groups.group_0.format",
            "found 'mixed-precision'",
        ),
        (_make_config(group={"weights": [4]}), "config_groups.group_0.weights", "found [4]"),
        (_make_config(group={"colour": 1}), "config_groups.group_0.colour", "does not have"),
    ],
)
def test_field_of_a_group_is_named_with_its_modules(tmp_path, config, field, what):
    stored = _store(tmp_path, "model.layers.0.q.weight_packed", "model.layers.1.q.weight_packed")
    [fault], warnings = _parse(config).check_groups(stored)
    assert fault.tensor == f"quantization_config.{field}" and not warnings
    assert what in fault.what and fault.way_out
    assert fault.what.endswith(": 2 modules, model.layers.*.q")


@pytest.mark.parametrize(
    ("weights", "field", "what"),
    [
        ({"num_bits": 0}, "num_bits", "expected 1 to 8, found 0"),
        ({"num_bits": 9}, "num_bits", "expected 1 to 8, found 9"),
        ({"num_bits": True}, "num_bits", "expected 1 to 8, found True"),
        ({"num_bits": "4"}, "num_bits", "expected 1 to 8, found '4'"),
        ({"num_bits": 4.0}, "num_bits", "expected 1 to 8, found 4.0"),
        ({"num_bits": None}, "num_bits", "found None"),
        ({"type": "float"}, "type", "expected 'int', found 'float'"),
        ({"dynamic": True}, "dynamic", "expected false, found True"),
        ({"dynamic": "local"}, "dynamic", "expected false, found 'local'"),
        ({"block_structure": [128, 128]}, "block_structure", "[128, 128] contradicts strategy"),
        ({"actorder": "random"}, "actorder", "found 'random'"),
        ({"actorder": ["group"]}, "actorder", "found ['group']"),
        ({"strategy": "tensor", "group_size": None}, "strategy", "found 'tensor'"),
        ({"strategy": None, "group_size": None}, "strategy", "found 'tensor'"),
        ({"strategy": "block"}, "strategy", "found 'block'"),
        ({"strategy": "token"}, "strategy", "found 'token'"),
        ({"strategy": "tensor_group"}, "strategy", "found 'tensor_group'"),
        ({"strategy": "attn_head"}, "strategy", "found 'attn_head'"),
        ({"strategy": ["group"]}, "strategy", "found ['group']"),
        ({"group_size": None}, "group_size", "None contradicts strategy 'group'"),
        ({"group_size": -1}, "group_size", "-1 contradicts strategy 'group'"),
        ({"group_size": 0}, "group_size", "0 contradicts strategy 'group'"),
        ({"strategy": "channel"}, "group_size", "32 contradicts strategy 'channel'"),
        ({"strategy": None, "group_size": "32"}, "group_size", "found '32'"),
        ({"strategy": None, "group_size": 32.0}, "group_size", "found 32.0"),
        ({"strategy": None, "group_size": True}, "group_size", "found True"),
        ({"strategy": None, "group_size": 0}, "group_size", "found 0"),
        ({"strategy": None, "group_size": -2}, "group_size", "found -2"),
        ({"symmetric": None}, "symmetric", "expected true or false, found None"),
        ({"symmetric": 0}, "symmetric", "expected true or false, found 0"),
        ({"zero_point_bias": 8}, "zero_point_bias", "does not have"),
    ],
)
def test_weights_that_are_not_supported_are_named(tmp_path, weights, field, what):
    parsed = _parse(_make_config(weights))
    [fault], _ = parsed.check_groups(_store(tmp_path, "m.weight_packed"))
    assert fault.tensor == f"quantization_config.config_groups.group_0.weights.{field}"
    assert what in fault.what and fault.what.endswith(": 1 module, m") and fault.way_out
    assert parsed.find_scheme("m") is None


def test_all_faults_of_all_groups_are_listed(tmp_path):
    groups = {
        "a": {"targets": ["Linear"], "weights": WEIGHTS | {"num_bits": 0, "dynamic": True}},
        "b": {
            "targets": ["x"],
            "weights": WEIGHTS | {"group_size": 0},
            "input_activations": {"n": 1},
        },
    }
    config = _make_config(config_groups=groups, kv_cache_scheme={"num_bits": 8}, ignore=["re:("])
    parsed, faults = parse_quantization(config)
    assert {fault.tensor.partition(".")[2] for fault in faults} == {"kv_cache_scheme", ""}
    parsed = _parse(_make_config(config_groups=groups))
    faults, _ = parsed.check_groups(_store(tmp_path, "m.weight_packed", "x.weight_packed"))
    assert {fault.tensor.partition(".")[2] for fault in faults} == {
        "config_groups.a.weights.num_bits",
        "config_groups.a.weights.dynamic",
        "config_groups.b.input_activations",
        "config_groups.b.weights.group_size",
    }


@pytest.mark.parametrize(
    ("weights", "scheme"),
    [
        ({}, Scheme(4, 32, True)),
        ({"num_bits": 8, "symmetric": False}, Scheme(8, 32, False)),
        ({"num_bits": 1}, Scheme(1, 32, True)),
        ({"num_bits": 7}, Scheme(7, 32, True)),
        ({"strategy": "channel", "group_size": None}, Scheme(4, -1, True)),
        ({"strategy": "channel", "group_size": -1}, Scheme(4, -1, True)),
        ({"strategy": "channel", "group_size": 0}, Scheme(4, -1, True)),
        ({"strategy": None, "group_size": 128}, Scheme(4, 128, True)),
        ({"strategy": None, "group_size": -1}, Scheme(4, -1, True)),
        ({"actorder": "weight", "dynamic": None, "type": None}, Scheme(4, 32, True)),
        ({"actorder": "static"}, Scheme(4, 32, True)),
        ({"actorder": False}, Scheme(4, 32, True)),
        ({"actorder": True}, Scheme(4, 32, True)),
        ({"actorder": "Group", "strategy": "Group", "type": "INT"}, Scheme(4, 32, True)),
        ({"actorder": "dynamic", "unheard_of": None}, Scheme(4, 32, True)),
    ],
)
def test_supported_weights_are_read(weights, scheme):
    assert _parse(_make_config(weights)).find_scheme("m") == scheme


@pytest.mark.parametrize(
    ("order", "version", "reordered"),
    [
        ("group", "0.12.0", True),
        (True, "0.18.0", True),
        ("dynamic", "0.17.1", True),
        ("group", "0.11.0", False),
        ("group", "", False),
        ("weight", "0.17.0", False),
        (None, "0.17.0", False),
    ],
)
def test_a_weight_g_idx_must_be_there_where_it_was_never_left_out(order, version, reordered):
    config = _make_config({"actorder": order}, version=version)
    assert _parse(config).find_scheme("m") == Scheme(4, 32, True, reordered)
    channel = {"actorder": order, "strategy": "channel", "group_size": None}
    assert _parse(_make_config(channel, version=version)).find_scheme("m") == Scheme(4, -1, True)


def test_old_files_full_of_nulls_are_read():
    group = {"input_activations": None, "output_activations": None, "format": None}
    weights = {"actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax"}
    header = {"ignore": None, "kv_cache_scheme": None, "sparsity_config": {"format": "dense"}}
    header |= {"transform_config": {}, "quantization_status": "frozen"}
    assert _parse(_make_config(weights, group, **header)).find_scheme("m") == Scheme(4, 32, True)
    raw = _make_config(weights, group)["quantization_config"]
    assert _parse({"compression_config": raw}).find_scheme("m") == Scheme(4, 32, True)


@pytest.mark.parametrize(
    "header",
    [
        {"transform_config": {"config_groups": {}}},
        {"transform_config": None, "sparsity_config": {}, "moe_sparsity_config": None},
        {"format": "mixed-precision"},
        {"format": None},
        {"ignore": ["re:[[a]x"]},  # Python warns of it
    ],
)
def test_what_changes_nothing_is_read(tmp_path, header):
    parsed = _parse(_make_config(**header))
    assert parsed.find_scheme("m") == Scheme(4, 32, True)
    assert parsed.check_groups(_store(tmp_path, "m.weight_packed")) == ([], [])


@pytest.mark.parametrize("place", ["text_config", "llm_config", "language_config"])
def test_the_config_of_a_part_is_read_and_named_by_its_place(place):
    scheme = _parse({place: _make_config(), "model_type": "x"}).find_scheme("m")
    assert scheme == Scheme(4, 32, True)
    assert _parse({"quantization_config": {}, place: _make_config()}).find_scheme("m") == scheme
    _, [fault] = parse_quantization({place: _make_config(kv_cache_scheme={"num_bits": 8})})
    assert fault.tensor == f"{place}.quantization_config.kv_cache_scheme"


def test_two_configs_that_differ_are_a_warning_and_the_outer_one_counts():
    inner = _make_config({"num_bits": 8})
    parsed = _parse(_make_config() | {"text_config": inner})
    assert parsed.find_scheme("m") == Scheme(4, 32, True)
    [warning] = parsed.check_groups({})[1]
    assert "text_config.quantization_config differs from quantization_config" in warning
    same = _make_config({"observer": "mse"})
    assert not _parse(_make_config() | {"text_config": same}).check_groups({})[1]


def test_a_checkpoint_that_is_not_quantized_has_no_scheme():
    assert _parse({}).find_scheme("m") is None
    assert _parse({"quantization_config": None, "text_config": 3}).find_scheme("m") is None
    assert _parse({"quantization_config": {}}).find_scheme("m") is None
    assert _parse(_make_config(config_groups={})).find_scheme("m") is None
    assert _parse(_make_config(group={"weights": None})).find_scheme("m") is None


def test_a_group_of_another_format_without_modules_is_a_warning(tmp_path):
    parsed = _parse(_make_config({"type": "float"}, {"targets": ["re:mtp"]}))
    faults, [warning] = parsed.check_groups(_store(tmp_path, "model.q.weight_packed"))
    assert not faults
    assert warning.startswith("config.json: quantization_config.config_groups.group_0.weights.type")
    assert "no module here is quantized so" in warning


@pytest.mark.parametrize(
    ("role", "shape", "dtype", "refused"),
    [
        ("weight", (8, 8), "f4", False),
        ("weight", (8, 8), "i1", True),
        ("weight_scale", (8, 1), "f4", True),
        ("input_scale", (1,), "f4", True),
        ("A_log", (8,), "f4", False),
    ],
)
def test_of_a_refused_group_are_modules_that_are_stored_quantized(
    tmp_path, role, shape, dtype, refused
):
    stored = _store(tmp_path, f"m.{role}", shape=shape, dtype=dtype)
    faults, warnings = _parse(_make_config({"type": "float"})).check_groups(stored)
    assert bool(faults) == refused and bool(warnings) != refused


@pytest.mark.parametrize(("shape", "refused"), [((8, 8), True), ((8,), False)])
def test_of_quantized_activations_are_plain_matrices_too(tmp_path, shape, refused):
    config = _make_config(group={"weights": None, "input_activations": {"num_bits": 8}})
    faults, _ = _parse(config).check_groups(_store(tmp_path, "m.weight", shape=shape))
    assert bool(faults) == refused


@pytest.mark.parametrize(
    ("target", "ignore", "refused"),
    [
        ("re:.*self_attn$", [], True),
        ("model.self_attn", [], True),
        ("LlamaAttention", [], True),
        ("LlamaAttention", ["re:.*self_attn$"], False),
        ("LlamaAttention", ["LlamaAttention"], False),
        ("LlamaMLP", [], False),
        ("re:.*mlp$", [], False),
    ],
)
def test_attention_that_quantizes_what_it_computes_is_refused(tmp_path, target, ignore, refused):
    group = {"targets": [target], "weights": None, "input_activations": {"num_bits": 8}}
    stored = _store(tmp_path, "model.self_attn.q_proj.weight", "model.mlp.up_proj.weight")
    faults, _ = _parse(_make_config(group=group, ignore=ignore)).check_groups(stored)
    assert [fault.what.rpartition(": ")[2] for fault in faults] == (
        ["1 module, model.self_attn"] if refused else []
    )


def test_patterns_that_match_nothing_are_listed_once():
    modules = ["model.embed_tokens", "model.layers.0.up", "model.layers.1.up", "lm_head"]
    ignore = ["re:x", "re:x", "visual.0.q", "visual.1.q", "model.layers.0", "re:.*layers$", "Conv"]
    groups = [["Linear", "re:.*up"], ["Embedding", "mtp.0"], ["Module", "linear"]]
    config = _make_config(
        ignore=ignore,
        config_groups={str(i): {"targets": t, "weights": WEIGHTS} for i, t in enumerate(groups)},
    )
    parsed = _parse(config)
    unused = ["mtp.0", "linear", "re:x", "visual.0.q", "visual.1.q", "Conv"]
    assert parsed.list_unused(modules) == unused
    assert parsed.list_unused(["lm_head"]) == [
        *("re:.*up", "Embedding", "mtp.0", "linear", "re:x", "visual.0.q", "visual.1.q"),
        *("model.layers.0", "re:.*layers$", "Conv"),
    ]
    assert parsed.describe_unused(modules) == [
        "config.json: pattern 'mtp.0' matches no module",
        "config.json: pattern 'linear' matches no module",
        "config.json: pattern 're:x' matches no module",
        "config.json: 2 names like 'visual.*.q' match no module",
        "config.json: pattern 'Conv' matches no module",
    ]


def test_modules_are_described_by_pattern_and_number():
    assert describe_modules(["lm_head"]) == "1 module, lm_head"
    paths = [f"layers.{i}.{name}" for i in range(3) for name in "qkvo"]
    assert describe_modules(paths) == "12 modules, layers.*.q, layers.*.k, layers.*.v, …"
    assert list(list_prefixes("a.b.c")) == ["a.b.c", "a.b", "a"]


@pytest.mark.parametrize(
    "path",
    [
        *("model.embed_tokens", "transformer.wte", "transformer.wpe", "gpt_neox.embed_in"),
        *("model.language_model.embed_tokens_per_layer", "backbone.embeddings", "visual.pos_embed"),
        *("model.tok_embeddings", "bert.word_embeddings", "vision.position_embedding"),
    ],
)
def test_embeddings_are_known_by_name(path):
    assert name_classes(path) == ("Embedding", "Module")


@pytest.mark.parametrize(
    "path",
    [
        *("lm_head", "embed_out", "embed_vision.embedding_projection", "visual.patch_embed.proj"),
        *("model.embed_tokens.0", "model.rotary_embed_proj"),
    ],
)
def test_other_modules_count_as_linear(path):
    assert name_classes(path) == ("Linear", "Module")
