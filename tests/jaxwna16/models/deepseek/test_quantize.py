"""Our own `quantize` of a float model with latent attention: what it writes loads and generates."""

from __future__ import annotations

import json

import pytest

import jaxwna16
from jaxwna16.cli.main import main
from jaxwna16.generation.tokens import generate_tokens
from jaxwna16.layers.moe import QuantMoE
from jaxwna16.models.nearest import LACKING
from tests.folders import write_folder
from tests.jaxwna16.models.family_rows import BASES
from tests.jaxwna16.models.hf_checkpoints import Folders, load_reference
from tests.jaxwna16.models.hf_models import (
    forward,
    make_reference,
    random_tokens,
    reference_logits,
    relative_error,
)


def test_a_model_that_quantize_wrote_has_the_logits_of_its_dequantized_floats(tmp_path):
    folders = Folders(tmp_path / "packed", tmp_path / "dequantized")
    make_reference(BASES["glm4_moe_lite"], dtype="float32").save_pretrained(tmp_path / "floats")
    jaxwna16.quantize_checkpoint(tmp_path / "floats", folders.packed, group_size=16)
    jaxwna16.dequantize_checkpoint(folders.packed, folders.floats)
    model = jaxwna16.load_model(folders.packed, dtype="float32")
    assert type(model.model.layers[1].mlp.experts) is QuantMoE
    tokens = random_tokens(2, 24)
    logits = forward(model, tokens)
    assert relative_error(logits, reference_logits(load_reference(folders), tokens)) < 1e-4
    result = generate_tokens(model, tokens[:1, :8].tolist(), max_new_tokens=4)
    assert len(result.tokens[0]) == 4


@pytest.mark.parametrize("model_type", LACKING)
def test_inspect_refuses_what_is_not_wna16_by_name(model_type, tmp_path, capsys):
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "format": "mxfp4-pack-quantized", "weights": weights}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": group},
    }
    config = {"model_type": model_type, "quantization_config": quantization}
    write_folder(tmp_path / "c", config, [{}])
    main(["inspect", str(tmp_path / "c"), "--json"])
    support = json.loads(capsys.readouterr().out)["load_model"]
    assert not support["supported"]
    assert f"{model_type} is not WNA16 as published: {LACKING[model_type]}" in support["reasons"]
