"""`jaxwna16 convert`, and every verb that reads a checkpoint on what it made."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxwna16
from tests.jaxwna16.checkpoints.converted import assert_same
from tests.jaxwna16.cli.checkpoints import write_float_checkpoint


@pytest.fixture(scope="module")
def copy(packed_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "tiny"
    jaxwna16.convert_checkpoint(packed_folder, folder)
    return folder


def test_convert_says_what_it_made(call, packed_folder, tmp_path):
    outcome = call("convert", packed_folder, tmp_path / "made")
    assert outcome.code == 0
    assert "14 modules converted, " in outcome.out
    assert f"made {tmp_path / 'made'}" in outcome.out
    expected = jaxwna16.load_checkpoint(packed_folder)
    assert_same(jaxwna16.load_checkpoint(tmp_path / "made"), expected)


def test_the_report_counts_both(call, packed_folder, tmp_path):
    report = call("convert", packed_folder, tmp_path / "made", "--json").report
    sizes = [
        call("inspect", folder, "--json").report["totals"]["bytes"]
        for folder in (packed_folder, tmp_path / "made")
    ]
    assert [report["source_bytes"], report["bytes"]] == sizes
    assert (report["modules"], report["layout_version"]) == (14, 1)


def test_inspect_shows_the_same_model_and_where_it_is_from(call, copy, packed_folder):
    found = call("inspect", copy, "--json").report
    expected = call("inspect", packed_folder, "--json").report
    assert found["converted_from"] == str(packed_folder)
    assert expected["converted_from"] is None
    assert found["load_model"] == expected["load_model"]
    for key in ("parameters", "quantized_parameters", "bfloat16_bytes"):
        assert found["totals"][key] == expected["totals"][key]
    assert f"from {packed_folder}" in call("inspect", copy).out


def test_generate_takes_the_copy(call, copy):
    outcome = call("generate", copy, "--prompt", "Hello", "--max-new-tokens", 2, "--json")
    assert outcome.code == 0
    assert outcome.report["folder"] == str(copy)


def test_perplexity_is_the_same(call, copy, packed_folder, tmp_path):
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. " * 4)
    options = ["--text", tmp_path / "text.txt", "--window", 32, "--json"]
    found, expected = (
        call("eval", "perplexity", folder, *options).report for folder in (copy, packed_folder)
    )
    assert found["nll"] == expected["nll"]


def test_verify_reads_every_byte(call, copy, tmp_path):
    outcome = call("verify", copy)
    assert outcome.code == 0
    assert "the llama model finds every tensor it needs" in outcome.out
    assert "good: 14 quantized modules and 7 other tensors" in outcome.out


def test_verify_finds_one_bit(call, packed_folder, tmp_path):
    folder = tmp_path / "made"
    jaxwna16.convert_checkpoint(packed_folder, folder)
    file = folder / "jaxwna16.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.packed"
    tensors[name] = tensors[name].copy()
    tensors[name].flat[7] ^= 1
    save_file(tensors, file)
    outcome = call("verify", folder, "--json")
    assert outcome.code == 1
    (fault,) = outcome.report["error"]["faults"]
    assert fault["tensor"] == name
    assert fault["what"] == "jaxwna16.json says that other numbers were written"


def test_numbers_that_are_not_finite_are_a_warning(call, tmp_path):
    write_float_checkpoint(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = np.full(64, np.nan, np.float32)
    save_file(tensors, file)
    call("convert", tmp_path / "source", tmp_path / "made")
    outcome = call("verify", tmp_path / "made")
    assert outcome.code == 0
    assert "model.norm.weight: 64 of 64 values are not finite" in outcome.out


@pytest.mark.parametrize("verb", ["convert", "quantize", "dequantize"])
def test_copy_is_refused_as_a_source(call, copy, packed_folder, tmp_path, verb):
    outcome = call(verb, copy, tmp_path / "made", "--json")
    assert outcome.code == 1
    (fault,) = outcome.report["error"]["faults"]
    assert fault["way_out"] == f"use {packed_folder}"
    assert "error: " in outcome.err


def test_destination_that_exists_is_left_alone(call, packed_folder, copy):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in copy.iterdir())
    outcome = call("convert", packed_folder, copy)
    assert outcome.code == 1
    assert "the destination exists already" in outcome.err
    assert sorted((path.name, path.stat().st_mtime_ns) for path in copy.iterdir()) == before


def test_other_tools_do_not_take_the_copy_for_a_checkpoint(copy):
    """transformers finds no weights; vLLM and SGLang stop at a quant_method they do not know."""
    transformers = pytest.importorskip("transformers")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(copy)
    method = json.loads((copy / "config.json").read_text())["quantization_config"]["quant_method"]
    known = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert method not in known
