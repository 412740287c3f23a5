"""Reading the config.json of a Qwen3.5: defaults, the text model's section, and what is refused."""

from __future__ import annotations

import pytest
import transformers

from jaxwna16.errors import ModelError
from jaxwna16.models.families import find_family, parse_config
from jaxwna16.models.filling.renaming import check_prefix, rename_all
from jaxwna16.models.qwen3_5.config import KINDS
from loaders.plan import make_plan
from tests.sparse import write_sparse


def read(model_type: str = "qwen3_5_text", **changes):
    return parse_config({"model_type": model_type, **changes})


@pytest.mark.parametrize("model_type", KINDS)
def test_absent_keys_take_the_defaults_of_transformers(model_type):
    theirs = transformers.AutoConfig.for_model(model_type).to_dict()
    assert read(model_type) == parse_config(theirs)


def test_every_fourth_layer_is_attention_or_those_that_the_config_lists():
    assert read(num_hidden_layers=8).is_full == (False, False, False, True) * 2
    assert read(num_hidden_layers=4, full_attention_interval=2).is_full == (False, True) * 2
    listed = ["full_attention", "linear_attention"]
    assert read(num_hidden_layers=2, layer_types=listed).is_full == (True, False)


def test_part_of_a_head_is_rotated_wherever_the_config_says_how_much():
    assert read().rotary_dim == 64
    assert read(partial_rotary_factor=0.5).rotary_dim == 128
    rope = {"rope_theta": 1e7, "partial_rotary_factor": 0.125, "mrope_section": [11, 11, 10]}
    assert read(rope_parameters=rope).rotary_dim == 32
    assert read(rope_parameters=rope).rope.theta == 1e7


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate"),
        ("qwen3_5_text", {"linear_num_value_heads": 17}, "linear_num_value_heads"),
        ("qwen3_5_text", {"num_key_value_heads": 3}, "num_attention_heads"),
        ("qwen3_5_text", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen3_5_text", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim"),
        ("qwen3_5_text", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters"),
        ("qwen3_5_moe_text", {"num_experts": 4}, "num_experts_per_tok"),
        ("qwen3_5_moe_text", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(model_type, changes, reason):
    with pytest.raises(ModelError) as raised:
        read(model_type, **changes)
    assert raised.value.reasons[0].startswith(f"{reason}")


@pytest.mark.parametrize("block", ["block_sparse_moe", "mlp"])
def test_the_block_of_a_mixtral_has_one_name_in_the_model_whatever_the_files_call_it(
    block, tmp_path
):
    path = f"model.layers.0.{block}"
    names = {f"{path}.experts.{e}.{w}.weight" for e in (0, 1) for w in ("w1", "w2", "w3")}
    tensors = {name: ("BF16", (8, 8)) for name in names | {f"{path}.gate.weight"}}
    config = {"model_type": "mixtral", "num_local_experts": 2}
    plan = make_plan(write_sparse(tmp_path / "c", config, [tensors]))
    assert set(rename_all(plan.describe_leaves(), find_family(config).names)) == {
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.w13.weight",
        "model.layers.0.mlp.experts.w2.weight",
    }


def test_a_prefix_that_no_layer_should_have_is_said_once():
    """Published files repeat "language_model."; of other names only the right one is found."""
    names = find_family({"model_type": "qwen3_5", "text_config": {}}).names
    ends = [f"layers.{i}.mlp.{name}_proj" for i in range(3) for name in ("gate", "up", "down")]
    beside = ["lm_head.weight", "model.visual.blocks.0.attn.qkv.weight"]
    for prefix in ("model.", "model.language_model."):
        check_prefix([*(prefix + end for end in ends), *beside], names, "c")
    check_prefix(beside, names, "c")
    for prefix in ("model.language_model.language_model.", "language_model.model.", ""):
        with pytest.raises(ModelError) as raised:
            check_prefix([*(prefix + end for end in ends), *beside], names, "c")
        [reason] = raised.value.reasons
        assert reason.startswith(f"{prefix}layers.: expected model.layers., found this before the")
        assert "9 modules and tensors" in reason
