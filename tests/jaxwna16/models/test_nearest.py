"""What is said of a `model_type` that no family has: the nearest family, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxwna16.errors import ModelError
from jaxwna16.models.config.asked_keys import note_keys
from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.families import FAMILIES, find_family
from jaxwna16.models.nearest import LACKING, find_nearest
from tests.jaxwna16.models.family_rows import SMALL

READS = {name: family.read for family in FAMILIES for name in family.model_types}
PUBLISHED = Path(__file__).parent / "published"


def find_reasons(model_type: str, **keys) -> list[str]:
    """The reasons behind the first, which lists the supported types."""
    with pytest.raises(ModelError, match="this model is not supported") as raised:
        find_family({"model_type": model_type, **SMALL, **keys})
    assert raised.value.reasons[0].startswith("model_type: expected one of llama, ")
    return list(raised.value.reasons[1:])


def test_a_model_of_another_name_is_nearest_to_its_own_family():
    """Whichever reads everything that its config.json says."""
    files = sorted(PUBLISHED.glob("*.json"))
    assert files
    for file in files:
        config = json.loads(file.read_text())["config"]
        text = config.get("text_config", config)
        found = find_nearest({**text, "model_type": "unknown"}, READS)
        assert found is not None and not found.refused, file.name
        own = find_family(config)
        near = next(family for family in FAMILIES if found.model_type in family.model_types)
        # a plain one is read by several
        assert not found.unread or near.model == own.model, file.name


def test_the_parts_that_the_nearest_lacks_are_named_with_their_keys():
    experts = {"n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 32}
    mamba = {"mamba_d_state": 16, "mamba_n_heads": 4}
    near, *beyond, way_out = find_reasons("jambalike", **experts, **mamba, num_experts_per_tok=2)
    assert near.startswith("the nearest supported model_type is ")
    assert beyond == ["state-space layers (Mamba): mamba_d_state, mamba_n_heads"]
    assert "docs/models.md" in way_out


def test_what_the_nearest_refuses_is_said_with_the_section():
    text = {**SMALL, "hidden_act": "xielu"}
    with pytest.raises(ModelError) as raised:
        find_family({"model_type": "apertus_omni", "text_config": text})
    assert any(
        reason.startswith("text_config.hidden_act: expected one of silu")
        for reason in raised.value.reasons
    )


def test_a_supported_model_inside_of_an_unknown_one_is_named():
    [reason] = find_reasons("some_vl", text_config={"model_type": "qwen3", **SMALL})
    assert reason == "text_config.model_type: qwen3 is supported, but not as a part of 'some_vl'"


@pytest.mark.parametrize("inner", [[], {}, 3, None])
def test_a_section_whose_model_type_is_no_name_is_compared_by_its_keys(inner):
    near, *_ = find_reasons("some_vl", text_config={"model_type": inner, **SMALL})
    assert near.startswith("the nearest supported model_type is ")


def test_a_model_that_differs_in_its_code_alone_is_said_to():
    near, beyond, _ = find_reasons("llamalike")
    assert "asks for" in near and "the difference is in its code" in beyond


def test_unknown_keys_are_listed_and_those_without_effect_are_not():
    _, beyond, _ = find_reasons("llamalike", use_cache=True, frobnicate=3, unused=None, off=False)
    assert beyond == "what these keys mean: frobnicate"


@pytest.mark.parametrize("model_type", LACKING)
def test_models_that_are_not_wna16_are_refused_by_name(model_type):
    [reason] = find_reasons(model_type, num_experts=8)
    assert reason.startswith(f"{model_type} is not WNA16 as published: ")


def test_of_what_is_no_language_model_nothing_is_said():
    with pytest.raises(ModelError) as raised:
        find_family({"model_type": "convnet", "depths": [3, 3]})
    assert len(raised.value.reasons) == 1


def test_keys_are_noted_within_the_block_only():
    reader = ConfigReader({"a": 1, "b": None, "c": 2})
    with note_keys() as asked:
        assert reader.count("a") == 1
        assert "b" not in reader.config
        assert reader.given["b"] is None
    assert reader.count("c") == 2
    assert asked == {"a", "b"}
