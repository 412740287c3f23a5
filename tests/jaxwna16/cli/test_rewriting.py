"""`jaxwna16 quantize` and `jaxwna16 dequantize`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxwna16.generation.load_model import load_model
from jaxwna16.models.filling.params import list_leaves
from tests.jaxwna16.cli.checkpoints import edit_config, edit_tensors


def read_weights(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]["weights"]


def test_quantize_says_what_it_made(call, float_folder, tmp_path):
    made = tmp_path / "made"
    outcome = call("quantize", float_folder, made, "--group-size", 32)
    assert outcome.code == 0
    assert "14 modules in 4 bits, groups of 32, symmetric" in outcome.out
    assert f"made {made}" in outcome.out
    assert (made / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("options", "bits", "size", "symmetric"),
    [
        (["--group-size", "32"], 4, 32, True),
        (["--bits", "8", "--group-size", "channel", "--asymmetric"], 8, None, False),
        (["--group-size", "16", "--symmetric"], 4, 16, True),
    ],
    ids=["group", "channel", "named symmetric"],
)
def test_the_scheme_is_the_one_asked_for(
    call, float_folder, tmp_path, options, bits, size, symmetric
):
    report = call("quantize", float_folder, tmp_path / "made", *options, "--json").report
    weights = read_weights(tmp_path / "made")
    found = weights["num_bits"], weights["group_size"], weights["symmetric"]
    assert found == (bits, size, symmetric)
    assert (report["bits"], report["group_size"]) == (bits, size or "channel")
    assert report["ratio"] == report["source_bytes"] / report["bytes"]


@pytest.mark.parametrize(
    ("options", "modules", "head"),
    [
        (["--ignore", r"re:.*\.mlp\."], 8, False),
        (["--ignore-only", r"re:.*\.mlp\."], 9, True),
        (["--ignore-only", ""], 15, True),
    ],
)
def test_ignore_adds_to_the_default_and_ignore_only_replaces_it(
    call, float_folder, tmp_path, options, modules, head
):
    made = tmp_path / "made"
    argv = ["--group-size", "32", *options, "--json"]
    assert call("quantize", float_folder, made, *argv).report["modules"] == modules
    assert ("lm_head.weight_packed" in load_file(made / "model.safetensors")) == head


def test_adding_to_the_default_and_replacing_it_is_a_wrong_call(call, float_folder, tmp_path):
    options = ["--ignore", "lm_head", "--ignore-only", "lm_head"]
    assert call("quantize", float_folder, tmp_path / "made", *options).code == 2


def test_quantize_and_dequantize_come_back_near_to_where_they_began(call, float_folder, tmp_path):
    packed, back = tmp_path / "packed", tmp_path / "back"
    call("quantize", float_folder, packed, "--bits", 8, "--group-size", 16, "--asymmetric")
    outcome = call("dequantize", packed, back)
    assert outcome.code == 0
    assert "14 modules dequantized" in outcome.out
    before = load_file(float_folder / "model.safetensors")
    after = load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=0.01)


def test_dequantize_casts_if_asked(call, packed_folder, tmp_path):
    call("dequantize", packed_folder, tmp_path / "made", "--dtype", "float16")
    dtypes = {str(a.dtype) for a in load_file(tmp_path / "made" / "model.safetensors").values()}
    assert dtypes == {"float16"}


def test_a_group_that_divides_nothing_is_one_line_for_all_layers(call, float_folder, tmp_path):
    outcome = call("quantize", float_folder, tmp_path / "made", "--group-size", 48)
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {float_folder}: 12 faults\n")
    assert "model.layers.{0-1}.self_attn.q_proj.weight" in outcome.err
    assert len(outcome.err.splitlines()) == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["quantize", "dequantize"])
def test_a_destination_that_exists_is_left_alone(call, float_folder, packed_folder, tmp_path, verb):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").write_text("precious")
    source, options = (
        (float_folder, ["--group-size", 32]) if verb == "quantize" else (packed_folder, [])
    )
    outcome = call(verb, source, tmp_path / "made", *options)
    assert outcome.code == 1
    assert "exists already" in outcome.err
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "mine"]


def test_numbers_that_cannot_be_quantized_leave_nothing_behind(call, broken, tmp_path):
    def damage(tensors):
        tensors["model.layers.1.mlp.up_proj.weight_scale"][0] = np.inf

    edit_tensors(broken, damage)
    outcome = call("dequantize", broken, tmp_path / "made")
    assert outcome.code == 1
    assert "not finite" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_what_is_packed_already_is_not_quantized_again(call, packed_folder, tmp_path):
    outcome = call("quantize", packed_folder, tmp_path / "made")
    assert outcome.code == 1
    assert "quantized already" in outcome.err


def test_what_is_not_packed_cannot_be_dequantized(call, float_folder, tmp_path):
    outcome = call("dequantize", float_folder, tmp_path / "made")
    assert outcome.code == 1
    assert "no module is quantized" in outcome.err


def test_the_way_out_of_a_quantized_cache_works_everywhere(call, packed_folder, broken, tmp_path):
    scales = {
        f"model.layers.{i}.self_attn.{name}": np.ones(1, np.float32)
        for i in (0, 1)
        for name in ("k_scale", "v_scale", "k_proj.output_scale")
    }
    edit_tensors(broken, lambda tensors: tensors.update(scales))
    edit_config(broken, lambda c: c["quantization_config"].update(kv_cache_scheme={"num_bits": 8}))
    outcome = call("verify", broken)
    assert outcome.code == 1
    assert "kv_cache_scheme" in outcome.err and "(set it to null: " in outcome.err
    edit_config(broken, lambda c: c["quantization_config"].update(kv_cache_scheme=None))
    for verb in ("verify", "inspect"):
        outcome = call(verb, broken, "--json")
        assert outcome.code == 0
        [warning] = outcome.report["warnings"]
        assert "and 5 more tensors not read: scales of a quantized key-value cache" in warning
    assert call("dequantize", broken, tmp_path / "floats").code == 0
    assert not any("scale" in name for name in load_file(tmp_path / "floats" / "model.safetensors"))
    model, expected = load_model(broken), load_model(packed_folder)
    assert model.warnings == (warning,)
    leaves = list_leaves(expected)
    for path, leaf in list_leaves(model).items():
        np.testing.assert_array_equal(leaf, leaves.pop(path))
    assert not leaves


@pytest.mark.parametrize(
    "options", [["--bits", "3"], ["--group-size", "0"], ["--group-size", "-1"], ["--dtype", "int8"]]
)
def test_a_scheme_that_does_not_exist_is_a_wrong_call(call, float_folder, tmp_path, options):
    outcome = call("quantize", float_folder, tmp_path / "made", *options)
    assert outcome.code == 2
    assert "usage:" in outcome.err
