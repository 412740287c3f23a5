"""A thinker within a whole that also speaks is the thinker alone, under other names."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxwna16
from jaxwna16.models.families import parse_config
from jaxwna16.models.wrapped.table import WRAPPERS
from tests.jaxwna16.models.family_rows import BASES
from tests.jaxwna16.models.hf_models import forward, make_reference, random_tokens

WHOLES = {name: f"{name}_thinker" for name in ("qwen2_5_omni", "qwen3_omni_moe")}
SPOKEN = {
    "talker.model.layers.0.mlp.gate.weight": (8, 8),
    "token2wav.code2wav_dit_model.norm_out.linear.weight": (8, 8),
    "code2wav.decoder.0.conv.weight": (8, 8, 3),
}


def test_every_whole_with_a_thinker_is_compared():
    assert WHOLES.keys() == {name for name, w in WRAPPERS.items() if w.path[0] == "thinker_config"}


@pytest.mark.parametrize("outer", WHOLES)
def test_a_thinker_within_a_whole_has_the_same_logits(outer, tmp_path):
    reference = make_reference(BASES[WHOLES[outer]], num_hidden_layers=1)
    alone, whole = tmp_path / "alone", tmp_path / "whole"
    reference.save_pretrained(alone)
    config = json.loads((alone / "config.json").read_text())
    tensors = load_file(alone / "model.safetensors")
    names = {name.removeprefix("thinker."): array for name, array in tensors.items()}
    spoken = {name: np.ones(shape, np.float32) for name, shape in SPOKEN.items()}
    whole.mkdir()
    save_file({f"thinker.{n}": a for n, a in names.items()} | spoken, whole / "model.safetensors")
    outside = {"model_type": outer, "thinker_config": config, "talker_config": {}}
    (whole / "config.json").write_text(json.dumps(outside))
    models = [jaxwna16.load_model(folder, dtype="float32") for folder in (alone, whole)]
    ours, same = (np.asarray(forward(model, random_tokens(1, 8))) for model in models)
    np.testing.assert_array_equal(ours, same)
    [skipped] = [warning for warning in models[1].warnings if "what speaks" in warning]
    assert f"and {len(SPOKEN) - 1} more parts not loaded" in skipped


def test_keys_of_a_thinker_are_named_in_full():
    sizes = {"hidden_size": 64, "hidden_act": "gelu"}
    config = {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": sizes}}
    with pytest.raises(jaxwna16.ModelError) as raised:
        parse_config(config)
    assert "thinker_config.text_config.hidden_act: expected one of silu" in str(raised.value)
