"""examples/make_moe.py beside the dense model that it is made of."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from examples.make_moe import make_moe
from jaxwna16.models.families import parse_config
from tests.jaxwna16.cli.checkpoints import edit_config


@pytest.mark.parametrize(
    "stated",
    [{}, {"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}],
)
def test_all_but_the_experts_is_configured_as_in_the_dense_model(floats, tmp_path, stated):
    def leave_out(config):
        for name in ("rope_theta", "rms_norm_eps", "num_key_value_heads"):
            del config[name]
        config.update(stated)

    dense = shutil.copytree(floats, tmp_path / "dense")
    edit_config(dense, leave_out)
    mixture = make_moe(dense, tmp_path / "mixture")
    ours, theirs = (
        parse_config(json.loads((folder / "config.json").read_text()))
        for folder in (mixture, dense)
    )
    assert ours.moe is not None
    assert dataclasses.replace(ours, model_type="llama", moe=None) == theirs
