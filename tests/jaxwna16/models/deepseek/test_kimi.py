"""Kimi K2 and K2.5 as they are published: int4 experts, names and keys of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import jaxwna16
from jaxwna16.cli.main import main
from jaxwna16.errors import InputError
from jaxwna16.generation.tokens import generate_tokens
from tests.jaxwna16.models.family_rows import BASES, ROWS
from tests.jaxwna16.models.family_rows.wrapped import KIMI_IGNORE
from tests.jaxwna16.models.hf_checkpoints import Folders, load_reference, write_row
from tests.jaxwna16.models.hf_models import (
    forward,
    generate_reference,
    make_reference,
    random_tokens,
    reference_logits,
    relative_error,
    run_logits,
    run_pieces,
)

CODE = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Folders:
    """As transformers saves it, but for the ignore list, which is the published one.

    `lm_head` is no module there, and nothing is said of `mlp.gate`: both are plain tensors.
    """
    folders = write_row(
        make_reference(BASES["kimi_k25"]), ROWS["kimi_k25"], tmp_path_factory.mktemp("kimi")
    )
    edit(folders.packed, lambda config: config["quantization_config"].update(ignore=[*KIMI_IGNORE]))
    return folders


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def publish(folders: Folders, folder: Path, *, alone: bool) -> Path:
    """The packed folder under published names.

    Args:
      alone: as Kimi K2, the text model by itself; otherwise as K2.5, with `quantization_config`
        in the section of the text model.
    """
    config = json.loads((folders.packed / "config.json").read_text())
    quantization = config.pop("quantization_config")
    text = config["text_config"] | {"model_type": "kimi_k2", "auto_map": CODE}
    text |= {"quantization_config": quantization}
    named = {}
    for name, tensor in load_file(folders.packed / "model.safetensors").items():
        name = name.replace(".model.blocks.", ".model.layers.")
        if alone and name.startswith("language_model."):
            named[name.removeprefix("language_model.")] = tensor
        elif not alone:
            named[name] = tensor
    folder.mkdir()
    config = text if alone else config | {"text_config": text, "auto_map": CODE}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("alone", [True, False], ids=["kimi_k2", "kimi_k25"])
def test_published_folders_give_the_logits_of_transformers(written, alone, tmp_path):
    reference = load_reference(written)
    model = jaxwna16.load_model(publish(written, tmp_path / "c", alone=alone), dtype="float32")
    assert not any("not loaded" in warning for warning in model.warnings) == alone
    tokens = random_tokens(2, 24)
    logits = forward(model, tokens)
    assert relative_error(logits, reference_logits(reference, tokens)) < 1e-4


def test_a_kimi_k2_generates_what_transformers_does(written, tmp_path):
    reference = load_reference(written)
    model = jaxwna16.load_model(publish(written, tmp_path / "c", alone=True), dtype="float32")
    tokens = generate_reference(reference, random_tokens(2, 9), 24)
    stream = run_pieces(model, tokens, [9, *[1] * 15])
    logits = run_logits(model, stream)
    assert relative_error(logits, reference_logits(reference, tokens)) < 1e-4
    result = generate_tokens(model, tokens[:1, :9].tolist(), max_new_tokens=15)
    assert result.tokens == [tokens[0, 9:].tolist()]


def test_inspect_tells_what_is_packed_and_what_is_left_out(written, tmp_path, capsys):
    folder = publish(written, tmp_path / "c", alone=False)
    assert main(["inspect", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["load_model"]["supported"]
    packed = {row["modules"]: row["count"] for row in report["quantized"]}
    assert set(packed) == {
        f"language_model.model.layers.*.mlp.experts.*.{name}_proj"
        for name in ("gate", "up", "down")
    }
    assert set(packed.values()) == {16}
    assert [row["reason"] for row in report["skipped"]] == ["the vision tower"]
    skipped = {row["tensors"].partition(".")[0] for row in report["plain"] if row["skipped"]}
    assert {"vision_tower", "mm_projector"} <= skipped


def test_tokens_that_stand_for_what_the_tower_sees_are_refused(written, tmp_path):
    edit(written.packed, lambda config: config.update(media_placeholder_token_id=101))
    model = jaxwna16.load_model(publish(written, tmp_path / "c", alone=False), dtype="float32")
    with pytest.raises(InputError, match=r"media_placeholder_token_id in config\.json"):
        generate_tokens(model, [[1, 101, 2]], max_new_tokens=1)
