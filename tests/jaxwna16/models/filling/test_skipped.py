"""`load_model` leaves out what a rule names, and lists it; what else has no place is an error."""

from __future__ import annotations

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from jaxwna16.checkpoints.convert import convert_checkpoint
from jaxwna16.checkpoints.load import load_checkpoint
from jaxwna16.checkpoints.quantize import quantize_checkpoint
from jaxwna16.errors import ModelError
from jaxwna16.generation.load_model import load_model
from jaxwna16.models.filling.skipped import find_skipped, list_rules
from jaxwna16.models.llama.config import LlamaConfig
from tests.jaxwna16.cli.checkpoints import (
    CONFIG,
    edit_config,
    edit_tensors,
    write_float_checkpoint,
)
from tests.jaxwna16.models.hf_models import forward

TOKENS = jnp.arange(6, dtype=jnp.int32)[None]
BESIDE = {
    "visual.patch_embed.proj.weight": (8, 4),
    "model.visual.merger.mlp.0.weight": (8, 4),
    "vision_tower.encoder.layers.0.q_proj.weight": (8, 4),
    "multi_modal_projector.linear_1.bias": (8,),
    "model.audio_tower.conv1.weight": (8, 4, 3),
    "mtp.layers.0.mlp.up_proj.weight": (8, 4),
    "model.mtp_layers.0.input_layernorm.weight": (8,),
}


def find(name: str, **changes) -> str | None:
    config = LlamaConfig.from_dict(CONFIG | changes)
    return find_skipped(list_rules(config), [name]).get(name)


@pytest.mark.parametrize("name", BESIDE)
def test_towers_and_heads_beside_the_language_model_are_named(name):
    assert find(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight",
        "model.visualize.weight",
        "vision.weight",
        "mtpx.weight",
        "model.norm.weight",
        "model.layers.0.visual.weight",
        "lm_head.weight",
    ],
)
def test_names_that_only_look_alike_are_not_named(name):
    assert find(name) is None


@pytest.mark.parametrize(("count", "layers"), [(None, []), (0, []), (1, [2]), (2, [2, 3])])
def test_layers_past_the_last_are_named_as_many_as_the_config_says(count, layers):
    changes = {} if count is None else {"num_nextn_predict_layers": count}
    named = [i for i in range(30) if find(f"model.layers.{i}.norm.weight", **changes)]
    assert named == layers


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Packed, and the same with what is beside a model in some checkpoints; one part is packed."""
    folder = tmp_path_factory.mktemp("plain")
    write_float_checkpoint(folder / "float")
    shutil.copytree(folder / "float", folder / "float beside")
    drawn = {name: np.ones(shape, np.float32) for name, shape in BESIDE.items()}
    drawn["mtp.layers.0.mlp.up_proj.weight"] = np.ones((32, 32), np.float32)
    edit_tensors(folder / "float beside", lambda tensors: tensors.update(drawn))
    for name, beside in (("", []), (" beside", ["re:.*visual", "re:.*tower"])):
        ignore = ["lm_head", *beside]
        source, destination = folder / f"float{name}", folder / f"packed{name}"
        quantize_checkpoint(source, destination, group_size=32, ignore_only=ignore)
    return folder


def test_the_model_is_the_same_and_its_warnings_list_what_was_left_out(plain):
    model, alone = load_model(plain / "packed beside"), load_model(plain / "packed")
    np.testing.assert_array_equal(forward(model, TOKENS), forward(alone, TOKENS))
    assert alone.warnings == ()
    text = "\n".join(model.warnings)
    assert "the vision tower" in text
    assert "the audio tower" in text
    assert "predicts several tokens at once" in text
    assert "model.visual.merger.mlp.0.weight and 3 more parts not loaded (416 bytes)" in text


def test_a_converted_copy_leaves_out_the_same(plain, tmp_path):
    convert_checkpoint(plain / "packed beside", tmp_path / "copy")
    model, alone = load_model(tmp_path / "copy"), load_model(plain / "packed")
    np.testing.assert_array_equal(forward(model, TOKENS), forward(alone, TOKENS))
    assert len(model.warnings) == 3


def test_load_checkpoint_reads_everything(plain):
    params = load_checkpoint(plain / "packed beside").params
    assert params["visual"]["patch_embed"]["proj"]["weight"].shape == (8, 4)
    assert params["mtp"]["layers"]["0"]["mlp"]["up_proj"].keys() >= {"packed", "scale"}


def test_anything_else_is_an_error_that_lists_all_of_it(plain, tmp_path):
    folder = shutil.copytree(plain / "packed beside", tmp_path / "c")
    strange = ("model.layers.2.norm.weight", "connector.weight")
    ones = {name: np.ones(4, np.float32) for name in strange}
    edit_tensors(folder, lambda tensors: tensors.update(ones))
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    names = {reason.partition(":")[0] for reason in caught.value.reasons}
    assert names == set(strange)
    edit_config(folder, lambda config: config.update(num_nextn_predict_layers=1))
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    [reason] = caught.value.reasons
    assert reason.startswith("connector.weight")
