"""A Llama of AutoAWQ, GPTQ and AutoRound, against transformers on the floats they stand for."""

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
    describe_auto_round,
    describe_awq,
    describe_gptq,
    make_linear,
    pack_awq,
    pack_gptq,
    quantize_linear,
)
from tests.checkpoints import assert_same_bits
from tests.folders import prefix_names, write_folder
from tests.jaxwna16.models.family_rows import BASES
from tests.jaxwna16.models.hf_models import (
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
    # of the 96 input features of down_proj, the last 32 are a short group
    "auto-round": {"symmetric": True, "group_size": 64},
}
LEFT_ALONE = ("embed_tokens", "lm_head")
# what is said of some modules, by the end of their name; of None they stay plain
OWN = {
    "gptq": {"up_proj": {"bits": 3, "act_order": True}},
    "auto-round": {
        "up_proj": None,
        "o_proj": {"bits": 2, "group_size": 16, "symmetric": True},
        "lm_head": {"bits": 8},
    },
}
RULES = {
    "gptq": {"dynamic": {r"+:.*\.up_proj": {"bits": 3}}},
    "auto-round": {
        "extra_config": {
            "model.layers.0.self_attn.o_proj": {"bits": 2, "group_size": 16},
            "lm_head": {"bits": 8, "group_size": 32, "sym": False, "act_bits": 16},
            r".*mlp\.up_proj.*": {"bits": 16, "data_type": "float"},
        }
    },
}
PACK = {"awq": pack_awq}
DESCRIBE = {"awq": describe_awq, "auto-round": describe_auto_round}
WARNINGS = {
    "auto-round": [
        "model.layers.0.mlp.down_proj: 96 input features are no multiple of group_size = 64, "
        "so that the last group is read as one of 32"
    ]
}


class Case(NamedTuple):
    """A folder, transformers' model with the floats that its weights stand for, and its kind."""

    folder: Path
    reference: Any
    kind: str


def _write(folder: Path, kind: str, *, bias: float | None = None, model: str = "llama") -> Case:
    reference = make_reference(model, num_hidden_layers=1)
    tensors = {}
    for i, (name, tensor) in enumerate(list_tensors(reference)):
        module = name.removesuffix(".weight")
        facts = _find_facts(kind, module.rpartition(".")[2])
        if tensor.ndim == 1 or facts is None:
            tensors[name] = tensor.detach().numpy().copy()
            continue
        linear = quantize_linear(tensor.detach().numpy(), seed=i, **facts)
        tensors |= prefix_names(module, PACK.get(kind, pack_gptq)(linear))
        if bias is not None:
            tensors[f"{module}.bias"] = np.full(len(linear.codes), bias, np.float16)
        if kind == "auto-round":
            del tensors[f"{module}.g_idx"]
        with torch.no_grad():
            tensor.copy_(linear.floats.float())
    linear = make_linear(32, 128, **FACTS[kind])
    quantization = DESCRIBE.get(kind, describe_gptq)(linear) | RULES.get(kind, {})
    config = reference.config.to_dict() | {"quantization_config": quantization}
    write_folder(folder, json.loads(json.dumps(config)), [tensors])
    for name in ("quantize_config.json", "quantization_config.json"):  # as AutoGPTQ, AutoRound
        (folder / name).write_text(json.dumps(quantization))
    return Case(folder, reference, kind)


def _find_facts(kind: str, name: str) -> dict[str, Any] | None:
    own = OWN.get(kind, {})
    return own[name] if name in own else None if name in LEFT_ALONE else FACTS[kind]


@pytest.fixture(scope="module", params=["awq", "gptq", "auto-round"])
def case(request, tmp_path_factory) -> Case:
    return _write(tmp_path_factory.mktemp("model") / "c", request.param)


def test_logits_are_those_of_the_dequantized_weights(case):
    model = jaxwna16.load_model(case.folder, dtype="float32")
    tokens = random_tokens(2, 16)
    found = forward(model, jnp.asarray(tokens))
    # float32 sums in another order; a feature in a wrong place or group gives more than 0.1
    assert relative_error(found, reference_logits(case.reference, tokens)) < 1e-4
    # a packed head is multiplied packed
    assert isinstance(model.lm_head, jaxwna16.QuantDense) == (case.kind == "auto-round")


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_projections_that_are_one_in_the_files_are_those_of_transformers(kind, tmp_path):
    """Phi-3's: AWQ packs zero points along N, GPTQ orders features of all parts alike."""
    case = _write(tmp_path / "c", kind, model=BASES["phi3"])
    model = jaxwna16.load_model(case.folder, dtype="float32")
    attention = vars(model.model.layers[0])["self_attn"]
    assert (attention.v_proj.perm is not None) == (kind == "gptq")
    tokens = random_tokens(2, 16)
    found = forward(model, jnp.asarray(tokens))
    assert relative_error(found, reference_logits(case.reference, tokens)) < 1e-4


def test_biases_of_zeros_of_such_projections_are_left_out(tmp_path):
    folder, reference, _ = _write(tmp_path / "c", "gptq, symmetric", bias=0.0, model=BASES["phi3"])
    model = jaxwna16.load_model(folder, dtype="float32")
    tokens = random_tokens(1, 9)
    found = forward(model, jnp.asarray(tokens))
    assert relative_error(found, reference_logits(reference, tokens)) < 1e-4
    with pytest.raises(ModelError, match=r"q_proj\.bias: expected nothing, found float16"):
        jaxwna16.load_model(
            _write(tmp_path / "d", "gptq, symmetric", bias=0.5, model=BASES["phi3"]).folder
        )


def test_dequantizing_gives_the_floats_of_the_tools_formula(case, tmp_path):
    jaxwna16.dequantize_checkpoint(case.folder, tmp_path / "floats")
    written = load_file(tmp_path / "floats" / "model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "floats/config.json").read_text())
    # of which GPTQModel would think that the weights are packed
    assert not (tmp_path / "floats" / "quantize_config.json").exists()
    assert not (tmp_path / "floats" / "quantization_config.json").exists()
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
    assert report["warnings"] == WARNINGS.get(case.kind, [])
    if command == "verify":
        assert report["modules"] == 7 and report["model"]["checked"]
    else:
        assert sum(row["count"] for row in report["quantized"]) == 7
        assert report["load_model"]["supported"]


def test_biases_of_zeros_that_the_model_does_not_have_are_left_out(tmp_path):
    folder, reference, _ = _write(tmp_path / "c", "gptq, symmetric", bias=0.0)
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
    folder = _write(tmp_path / "c", "gptq, symmetric", bias=0.5).folder
    with pytest.raises(ModelError, match=r"up_proj\.bias: expected nothing, found float16"):
        jaxwna16.load_model(folder)
