"""`quantize_checkpoint` on models of transformers that hold more than linear layers.

Each is saved by transformers, quantized with the defaults, verified and loaded; compressed-tensors
says which modules it takes for quantized by the config.json that was written.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
import torch
from safetensors.torch import load_file, save_file

import jaxwna16
from jaxwna16 import CheckpointError, InputError
from jaxwna16.checkpoints.left_alone import DEFAULT_IGNORE, list_default
from jaxwna16.cli.main import main
from jaxwna16.generation.tokens import generate_tokens
from loaders.plan import make_plan
from loaders.schemes.patterns.patterns import compile_pattern
from tests.checkpoints import read_files
from tests.jaxwna16.models.hf_checkpoints import Folders, load_reference
from tests.jaxwna16.models.hf_models import (
    forward,
    make_reference,
    random_tokens,
    reference_logits,
    relative_error,
)
from tests.skeletons import apply_config, build_skeleton

EXPERTS = r"re:.*\.experts\."


def save(reference, folder: Path, beside: dict[str, torch.Tensor]) -> Path:
    """Save a model, and tensors that published files hold and transformers does not."""
    reference.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | beside, file, metadata={"format": "pt"})
    return folder


def list_packed(folder: Path) -> set[str]:
    return set(make_plan(folder).quantized)


def resolve(folder: Path, rename=str) -> set[str]:
    """The modules that compressed-tensors takes for quantized, under names of another tool."""
    classes = {"Linear": [], "Embedding": []}
    for name, tensor in read_files(folder).items():
        path, _, role = name.rpartition(".")
        if role == "weight_packed" or (role == "weight" and tensor.ndim == 2):
            classes["Embedding" if "embed" in path else "Linear"].append(rename(path))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return set(apply_config(build_skeleton(classes), config))


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A Qwen3.5 with experts beside a tower and layers that predict: floats, and packed."""
    folder = tmp_path_factory.mktemp("multimodal")
    reference = make_reference("qwen3_5_moe", tie_word_embeddings=False)
    torch.manual_seed(1)
    mtp = {
        "mtp.fc.weight": torch.randn(128, 256),
        "mtp.layers.0.self_attn.q_proj.weight": torch.randn(256, 128),
        "mtp.layers.0.mlp.gate.weight": torch.randn(8, 128),
        "mtp.layers.0.mlp.experts.gate_up_proj": torch.randn(8, 256, 128),
        "mtp.layers.0.mlp.experts.down_proj": torch.randn(8, 128, 128),
    }
    floats = save(reference, folder / "floats", mtp)
    jaxwna16.quantize_checkpoint(floats, folder / "packed", group_size=32, symmetric=False)
    return Folders(folder / "packed", floats)


def test_what_stands_beside_the_language_model_is_left_alone(multimodal):
    left, packed = read_files(multimodal.packed), list_packed(multimodal.packed)
    kept = ("visual.", "mtp.", "mlp.gate.", "shared_expert_gate.", "in_proj_a.", "in_proj_b.")
    matrices = {
        name.removesuffix(".weight")
        for name, tensor in read_files(multimodal.floats).items()
        if tensor.ndim == 2 and not any(part in name for part in kept)
    }
    assert packed == {p for p in matrices if not p.endswith(("embed_tokens", "lm_head"))}
    for name, tensor in read_files(multimodal.floats).items():
        if name.removesuffix(".weight") not in packed:
            assert torch.equal(left[name], tensor), name


def rename_as_vllm(path: str) -> str:
    path = re.sub(r"^model\.language_model\.", "language_model.model.", path)
    return re.sub(r"^model\.visual\.", "visual.", path)


@pytest.mark.parametrize("rename", [str, rename_as_vllm])
@pytest.mark.filterwarnings("ignore")
def test_other_tools_take_the_same_modules_for_quantized(multimodal, rename):
    expected = {rename(path) for path in list_packed(multimodal.packed)}
    assert resolve(multimodal.packed, rename) == expected


def test_a_quantized_multimodal_model_is_verified_and_writes_what_transformers_does(
    multimodal, tmp_path, capsys
):
    assert main(["verify", str(multimodal.packed)]) == 0, capsys.readouterr().err
    assert "finds every tensor it needs" in capsys.readouterr().out
    jaxwna16.dequantize_checkpoint(multimodal.packed, tmp_path / "floats")
    reference = load_reference(Folders(multimodal.packed, tmp_path / "floats"))
    model = jaxwna16.load_model(multimodal.packed)
    tokens = random_tokens(1, 7)
    expected = reference_logits(reference, tokens)
    # the bound of the same model in models/qwen3_5: float32 sums in another order
    assert relative_error(forward(model, jnp.asarray(tokens)), expected) < 1e-4
    [[first]] = generate_tokens(model, tokens.tolist(), max_new_tokens=1).tokens
    assert first == expected[0, -1].argmax()


def test_layers_past_the_last_are_left_alone(tmp_path):
    reference = make_reference("glm4_moe, grouped", num_nextn_predict_layers=1)
    last = reference.config.num_hidden_layers
    names = [f"model.layers.{last}.{name}.weight" for name in ("eh_proj", "mlp.up_proj")]
    beside = {name: torch.randn(64, 64) for name in names}
    source = save(reference, tmp_path / "source", beside)
    jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=16)
    assert main(["verify", str(tmp_path / "out")]) == 0
    packed = list_packed(tmp_path / "out")
    assert f"model.layers.{last - 1}.mlp.experts.0.up_proj" in packed
    assert not any(path.startswith(f"model.layers.{last}.") for path in packed)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A model whose experts have 48 features inside, 64 outside."""
    folder = tmp_path_factory.mktemp("experts")
    return save(make_reference("qwen3_moe"), folder / "floats", {})


def test_the_way_out_of_a_group_size_that_divides_no_expert_works(experts, tmp_path):
    with pytest.raises(CheckpointError, match="group_size must divide") as caught:
        jaxwna16.quantize_checkpoint(experts, tmp_path / "out", group_size=32)
    [way_out] = {fault.way_out for fault in caught.value.faults}
    assert way_out.endswith(f"or ignore all experts: {EXPERTS}")
    jaxwna16.quantize_checkpoint(experts, tmp_path / "out", group_size=32, ignore=[EXPERTS])
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert list_packed(tmp_path / "out")


@pytest.mark.parametrize(
    "ignored",
    [{"ignore": [r"re:.*down_proj$"]}, {"ignore": [r"re:.*q_proj$"]}, {"ignore_only": ()}],
)
def test_what_is_written_is_verified_and_what_is_refused_is_not_written(
    experts, tmp_path, capsys, ignored
):
    try:
        jaxwna16.quantize_checkpoint(experts, tmp_path / "out", group_size=16, **ignored)
    except InputError as error:
        assert "load_model could not load the result" in str(error)
        assert not (tmp_path / "out").exists()
    else:
        assert main(["verify", str(tmp_path / "out")]) == 0, capsys.readouterr().err
        assert jaxwna16.load_model(tmp_path / "out", progress=False)


def test_a_model_of_another_family_is_verified_too(experts, tmp_path, capsys):
    source = shutil.copytree(experts, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "unheard_of", "num_nextn_predict_layers": 2}
    (source / "config.json").write_text(json.dumps(config))
    jaxwna16.quantize_checkpoint(source, tmp_path / "out", group_size=16)
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "model not checked" in capsys.readouterr().out
    assert list_default(config) == (*DEFAULT_IGNORE, r"re:(.*\.)?layers\.(2|3)\..*")


def test_default_patterns_name_parts_and_not_what_only_sounds_alike():
    patterns = [compile_pattern(entry[3:]) for entry in DEFAULT_IGNORE if entry[:3] == "re:"]

    def is_left(path):
        return path == "lm_head" or any(pattern.match(path) for pattern in patterns)

    left = [
        *("lm_head", "language_model.lm_head", "score", "model.layers.0.mlp.gate"),
        *("model.layers.0.mlp.router.classifier", "model.layers.3.mlp.shared_expert_gate"),
        *("thinker.visual.blocks.0.attn.qkv", "model.vision_tower.encoder.layers.0.q_proj"),
        *("vision_model.encoder.layers.0.mlp.fc1", "multi_modal_projector.linear_1"),
        *("audio_tower.layers.0.fc1", "mtp.layers.0.mlp.up_proj", "model.mtp_layers.0.fc"),
        *("model.connector.modality_projection.proj", "mlp1.1"),
        *("model.layers.0.linear_attn.in_proj_b", "model.layers.0.linear_attn.in_proj_ba"),
    ]
    packed = [
        *("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.experts.0.gate_proj"),
        *("model.layers.0.mlp.shared_expert.gate_proj", "model.layers.0.self_attn.q_proj"),
        *("model.layers.0.linear_attn.in_proj_qkvz", "model.layers.0.linear_attn.out_proj"),
        *("model.visualize.proj", "mtpx.fc", "model.layers.0.mlp.navigate"),
        *("model.layers.0.self_attn.gate_up_proj", "model.layers.0.mlp.scores"),
    ]
    assert [path for path in [*left, *packed] if is_left(path)] == left
