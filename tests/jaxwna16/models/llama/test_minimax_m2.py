"""MiniMax-M2 as it is published: its names, AutoAWQ's experts, and what a file says too much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxwna16
from jaxwna16.cli.main import main
from jaxwna16.errors import ModelError
from jaxwna16.models.families import parse_config
from tests.awq_gptq import describe_awq, make_linear, pack_awq, quantize_linear
from tests.folders import prefix_names, write_folder
from tests.jaxwna16.models.hf_models import (
    forward,
    make_reference,
    random_tokens,
    reference_logits,
    relative_error,
)

DEAD = r"re:.*block_sparse_moe\.experts\.\d+\.gate_up_proj$"
STATED = {
    "attn_type_list": [1],
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "rotary_dim": 8,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
}
"""Keys of published files that transformers' class does not have."""


def write_awq(folder: Path) -> tuple[Path, Any]:
    """A layer as AutoAWQ writes it, with a layer past the last; and transformers' model of it."""
    reference = make_reference("minimax_m2", num_hidden_layers=1)
    layer = reference.model.layers[0]
    tensors = {
        name.replace(".mlp.", ".block_sparse_moe."): tensor.detach().numpy()
        for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]
        if ".experts." not in name and "inv_freq" not in name and not name.endswith("_proj.weight")
    }
    linears = {f"self_attn.{n}_proj": getattr(layer.self_attn, f"{n}_proj").weight for n in "qkvo"}
    for i in range(layer.mlp.experts.num_experts):
        path = f"block_sparse_moe.experts.{i}"
        gate, up = layer.mlp.experts.gate_up_proj[i].chunk(2)
        linears |= {
            f"{path}.w1": gate,
            f"{path}.w3": up,
            f"{path}.w2": layer.mlp.experts.down_proj[i],
        }
    for i, (path, weight) in enumerate(linears.items()):
        linear = quantize_linear(weight.detach().numpy(), seed=i)
        tensors |= prefix_names(f"model.layers.0.{path}", pack_awq(linear))
        with torch.no_grad():
            weight.copy_(linear.floats.float())
    extra = prefix_names("model.layers.1.self_attn.q_proj", pack_awq(make_linear(128, 64)))
    config = reference.config.to_dict() | STATED
    config["quantization_config"] = describe_awq(
        make_linear(32, 64), modules_to_not_convert=["gate", "lm_head", "gate_up_proj"]
    )
    write_folder(folder, json.loads(json.dumps(config)), [tensors | extra])
    return folder, reference


@pytest.fixture(scope="module")
def awq(tmp_path_factory) -> tuple[Path, Any]:
    return write_awq(tmp_path_factory.mktemp("minimax") / "c")


def test_experts_of_autoawq_under_published_names_give_transformers_logits(awq):
    folder, reference = awq
    model = jaxwna16.load_model(folder, dtype="float32")
    assert isinstance(model.model.layers[0].mlp.experts, jaxwna16.QuantMoE)
    np.testing.assert_array_equal(
        model.model.layers[0].mlp.gate.read_bias(),
        reference.model.layers[0].mlp.e_score_correction_bias.numpy(),
    )
    tokens = random_tokens(2, 16)
    found = forward(model, jnp.asarray(tokens))
    assert relative_error(found, reference_logits(reference, tokens)) < 1e-4


def test_layers_that_predict_are_left_out_and_a_dead_pattern_is_shown(awq, tmp_path, capsys):
    folder, _ = awq
    assert main(["inspect", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    [skipped] = report["skipped"]
    assert "past the last of 1 layers" in skipped["reason"]
    assert any("'gate_up_proj'" in warning for warning in report["warnings"])
    jaxwna16.dequantize_checkpoint(folder, tmp_path / "floats")
    jaxwna16.quantize_checkpoint(tmp_path / "floats", tmp_path / "packed", group_size=32)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    [group] = config["quantization_config"]["config_groups"].values()
    group["targets"].append(DEAD)
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path / "packed"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert any(DEAD in warning.replace("\\\\", "\\") for warning in report["warnings"])
    assert report["load_model"]["supported"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attn_type_list": [1, 0]}, "attn_type_list: expected 1 in every layer"),
        ({"qk_norm_type": "per_head"}, "qk_norm_type: expected 'per_layer'"),
        ({"shared_intermediate_size": 64}, "shared_intermediate_size: expected 0"),
        ({"use_qk_norm": False}, "use_qk_norm: expected True"),
        ({"use_routing_bias": False}, "use_routing_bias: expected True"),
        ({"scoring_func": "softmax"}, "scoring_func: expected one of sigmoid"),
        ({"rotary_dim": 33}, "rotary_dim: expected an integer of at least 2 and at most 32"),
        ({"rotary_dim": 7}, "partial_rotary_factor: expected an even part of head_dim = 32"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected rotary_dim = 8 of 32"),
    ],
)
def test_what_a_minimax_m2_is_not_is_refused_by_its_key(changes, reason):
    config = make_reference("minimax_m2").config.to_dict()
    del config["rope_parameters"]
    config |= STATED | {"head_dim": 32}
    assert parse_config(config).rotary_dim == 8
    with pytest.raises(ModelError) as raised:
        parse_config(config | changes)
    [found] = raised.value.reasons
    assert found.startswith(reason)
