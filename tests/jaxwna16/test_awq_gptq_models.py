"""A Llama of AutoAWQ and one of GPTQ, against transformers on the floats that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import jaxwna16
from jaxwna16.cli.main import main
from jaxwna16.errors import ModelError
from tests.awq_gptq import (
    describe_awq,
    describe_gptq,
    make_linear,
    pack_awq,
    pack_gptq,
    quantize_linear,
)
from tests.checkpoints import assert_same_bits
from tests.folders import prefix_names, write_folder
from tests.jaxwna16.hf_models import (
    forward,
    list_tensors,
    make_reference,
    random_tokens,
    reference_logits,
    relative_error,
)

FACTS = {
    "awq": {},
    "gptq": {"act_order": True},
    "gptq, symmetric": {"symmetric": True, "bits": 8},
}
LEFT_ALONE = ("embed_tokens.weight", "lm_head.weight")


class Case(NamedTuple):
    """A folder, and transformers' model with the floats that its packed weights stand for."""

    folder: Path
    reference: Any


def _write(folder: Path, kind: str, *, bias: float | None = None) -> Case:
    reference = make_reference("llama", num_hidden_layers=1)
    facts, tensors = FACTS[kind], {}
    pack = pack_awq if kind == "awq" else pack_gptq
    for i, (name, tensor) in enumerate(list_tensors(reference)):
        if tensor.ndim == 1 or name.endswith(LEFT_ALONE):
            tensors[name] = tensor.detach().numpy().copy()
            continue
        # the rule of the config
        own = {"bits": 3, "act_order": True} if name.endswith("up_proj.weight") else facts
        own = facts if kind != "gptq" else own
        linear = quantize_linear(tensor.detach().numpy(), seed=i, **own)
        module = name.removesuffix(".weight")
        tensors |= prefix_names(module, pack(linear))
        if bias is not None:
            tensors[f"{module}.bias"] = np.full(len(linear.codes), bias, np.float16)
        with torch.no_grad():
            tensor.copy_(linear.floats.float())
    linear = make_linear(32, 64, **facts)
    quantization = describe_awq(linear) if kind == "awq" else describe_gptq(linear)
    if kind == "gptq":
        quantization["dynamic"] = {r"+:.*\.up_proj": {"bits": 3}}
    config = reference.config.to_dict() | {"quantization_config": quantization}
    write_folder(folder, json.loads(json.dumps(config)), [tensors])
    (folder / "quantize_config.json").write_text(json.dumps(quantization))  # as AutoGPTQ
    return Case(folder, reference)


@pytest.fixture(scope="module", params=["awq", "gptq"])
def case(request, tmp_path_factory) -> Case:
    return _write(tmp_path_factory.mktemp("model") / "c", request.param)


def test_logits_are_those_of_the_dequantized_weights(case):
    model = jaxwna16.load_model(case.folder, dtype="float32")
    tokens = random_tokens(2, 16)
    found = forward(model, jnp.asarray(tokens))
    # float32 sums in another order; a feature in a wrong place or group gives more than 0.1
    assert relative_error(found, reference_logits(case.reference, tokens)) < 1e-4


def test_dequantizing_gives_the_floats_of_the_tools_formula(case, tmp_path):
    jaxwna16.dequantize_checkpoint(case.folder, tmp_path / "floats")
    written = load_file(tmp_path / "floats" / "model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "floats/config.json").read_text())
    # of which GPTQModel would think that the weights are packed
    assert not (tmp_path / "floats" / "quantize_config.json").exists()
    for name, tensor in list_tensors(case.reference):
        assert_same_bits(written.pop(name).astype(np.float32), tensor)
    assert not written


def test_a_converted_copy_holds_the_same(case, tmp_path):
    jaxwna16.convert_checkpoint(case.folder, tmp_path / "converted")
    found, expected = (
        jaxwna16.load_checkpoint(folder) for folder in (tmp_path / "converted", case.folder)
    )
    assert found.specs == expected.specs
    jax.tree.map(assert_same_bits, found.params, expected.params)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_the_command_line_reads_it(case, command, capsys):
    assert main([command, str(case.folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["warnings"] == []
    if command == "verify":
        assert report["modules"] == 7 and report["model"]["checked"]
    else:
        assert sum(row["count"] for row in report["quantized"]) == 7
        assert report["load_model"]["supported"]


def test_biases_of_zeros_that_the_model_does_not_have_are_left_out(tmp_path):
    folder, reference = _write(tmp_path / "c", "gptq, symmetric", bias=0.0)
    model = jaxwna16.load_model(folder, dtype="float32")
    assert vars(model.model.layers[0])["mlp"].up_proj.bias is None
    tokens = random_tokens(1, 9)
    found = forward(model, jnp.asarray(tokens))
    assert relative_error(found, reference_logits(reference, tokens)) < 1e-4
    assert any("all 0 and left out" in warning for warning in model.warnings)
    assert (
        "bias" in jaxwna16.load_checkpoint(folder).params["model"]["layers"]["0"]["mlp"]["up_proj"]
    )


def test_a_bias_that_the_model_does_not_have_and_that_is_not_zero_is_an_error(tmp_path):
    folder, _ = _write(tmp_path / "c", "gptq, symmetric", bias=0.5)
    with pytest.raises(ModelError, match=r"up_proj\.bias: expected nothing, found float16"):
        jaxwna16.load_model(folder)
