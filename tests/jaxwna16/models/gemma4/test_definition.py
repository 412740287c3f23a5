"""What is particular to Gemma 4: its router, each feature by itself, caches, and names in files."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxwna16
from jaxwna16.generation.tokens import generate_tokens
from jaxwna16.models.families import find_family
from jaxwna16.models.filling.params import fill_model
from loaders.plan import make_plan
from pallas_kernels.xla import attention
from tests.checkpoints import assert_same_bits
from tests.jaxwna16.models.family_rows import BASES, ROWS
from tests.jaxwna16.models.hf_checkpoints import Folders, load_reference, write_row
from tests.jaxwna16.models.hf_models import (
    choose_experts,
    convert,
    forward,
    make_reference,
    nest_params,
    random_tokens,
    record_routers,
    reference_logits,
    relative_error,
)

EXPERTS = "gemma4_text, experts"
LAYERS = "model.layers"


def test_experts_and_their_weights_are_those_of_transformers():
    reference = make_reference(EXPERTS)
    model = convert(reference)
    routers = record_routers(reference, random_tokens(2, 24))
    assert routers.keys() == {0, 1}
    for layer, routed in routers.items():
        ids, weights = choose_experts(model, layer, routed.hidden)
        np.testing.assert_array_equal(ids, routed.ids)
        assert relative_error(weights, routed.weights) < 1e-5
        assert np.abs(weights.sum(-1) - 1).max() > 0.1  # each has its expert's scale


def run_with(reference, config_changes=None, params_changes=()):
    """Logits of our model of the same weights, but for these changes."""
    config = reference.config.to_dict()
    family = find_family(config)
    make, parsed = family.open_class(), family.read(config)
    parsed = dataclasses.replace(parsed, **(config_changes or (lambda _: {}))(parsed))
    params = nest_params(reference)
    for layer in params["model"]["layers"].values():
        for path in params_changes:
            *parents, last = path.split(".")
            node = layer
            for parent in parents:
                node = node[parent]
            node[last] = np.ones_like(node[last])
    abstract = nnx.eval_shape(lambda: make(parsed, dtype=jnp.float32))
    model = fill_model(abstract, params, family.names)
    return np.asarray(forward(model, jnp.asarray(random_tokens(2, 24))))


@pytest.mark.parametrize(
    ("changes", "ones"),
    [
        (lambda c: {"attention_scale": None}, ()),
        (lambda c: {"global_rope": dataclasses.replace(c.global_rope, proportion=1.0)}, ()),
        (lambda c: {"embedding_multiplier": 1.0}, ()),
        (None, ("layer_scalar",)),
        (None, ("router.scale",)),
        (None, ("router.per_expert_scale",)),
        (None, ("post_feedforward_layernorm_1.weight",)),
        (None, ("post_feedforward_layernorm_2.weight",)),
        (None, ("pre_feedforward_layernorm_2.weight",)),
    ],
)
def test_logits_change_where_a_feature_is_off(changes, ones):
    reference = make_reference(EXPERTS)
    # of what multiplies the whole stream, norms see little
    least = 0.001 if ones == ("layer_scalar",) else 0.01
    assert relative_error(run_with(reference, changes, ones), run_with(reference)) > least


@pytest.mark.parametrize("path", ["per_layer_input_gate", "post_per_layer_input_norm"])
def test_logits_change_with_what_layers_take_of_each_token(path):
    reference = make_reference(BASES["gemma4_text"])
    other = run_with(reference, params_changes=(f"{path}.weight",))
    assert relative_error(other, run_with(reference)) > 0.01


def test_logits_change_where_values_are_not_normalised(monkeypatch):
    reference = make_reference("gemma4_unified_text", num_hidden_layers=2)
    expected = run_with(reference)
    monkeypatch.setattr(attention, "normalise_values", lambda values, heads: values)
    jax.clear_caches()
    assert relative_error(run_with(reference), expected) > 0.01
    jax.clear_caches()


def test_layers_that_share_keep_nothing_and_others_their_own_heads():
    model = convert(make_reference(BASES["gemma4_text"]))
    cache = model.make_cache(3, 7)
    shapes = [None if layer is None else layer.k.shape for layer in cache]
    assert shapes == [(6, 7, 16), (6, 7, 32), None, None, None]


def rewrite(folder, change):
    """Change the tensors of a packed folder; its config.json stays."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stack_experts(tensors, name_role):
    """The experts of each layer as llm-compressor 0.12 writes them: one tensor for all."""
    apart = {name: t for name, t in tensors.items() if ".experts." in name}
    kept = {name: t for name, t in tensors.items() if name not in apart}
    layers = sorted({name.partition(".experts.")[0] for name in apart})
    roles = sorted({name.rpartition(".")[2] for name in apart})
    for layer in layers:
        path = f"{layer}.experts"
        for joint, kinds in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj",) * 2):
            kinds = (kinds,) if isinstance(kinds, str) else kinds
            for role in roles:
                held = [
                    np.concatenate([apart[f"{path}.{e}.{kind}.{role}"] for kind in kinds])
                    for e in range(4)
                ]
                if role == "weight_shape":
                    n, k = apart[f"{path}.0.{kinds[0]}.{role}"].tolist()
                    held = np.array([4, n * len(kinds), k], np.int64)
                kept[name_role(f"{path}.{joint}", role)] = np.ascontiguousarray(np.stack(held))
    return kept


SPELLINGS = {
    "without dots": lambda t: stack_experts(t, lambda p, r: p + r.removeprefix("weight")),
    "with dots": lambda t: stack_experts(t, lambda p, r: f"{p}.{r}"),
    "under moe": lambda t: {n.replace(".experts.", ".moe.experts."): a for n, a in t.items()},
}


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_spelling_of_packed_experts_is_the_same_model(symmetric, tmp_path):
    row = dataclasses.replace(ROWS["gemma4"], symmetric=symmetric)
    folder = write_row(make_reference(BASES["gemma4"]), row, tmp_path).packed
    original = load_file(folder / "model.safetensors")
    expected = jax.tree.leaves(nnx.state(jaxwna16.load_model(folder, dtype="float32")))
    for change in SPELLINGS.values():
        rewrite(folder, lambda _, change=change: change(original))
        found = jaxwna16.load_model(folder, dtype="float32")
        assert found.model.layers[0].experts.w13.packed is not None
        jax.tree.map(assert_same_bits, jax.tree.leaves(nnx.state(found)), expected)


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4"])
def test_what_quantize_writes_has_the_logits_of_its_floats(model_type, tmp_path):
    """Routers, embeddings and towers stay as they are."""
    make_reference(BASES[model_type]).save_pretrained(tmp_path / "source")
    folders = Folders(tmp_path / "packed", tmp_path / "floats")
    jaxwna16.quantize_checkpoint(tmp_path / "source", folders.packed, group_size=32)
    jaxwna16.dequantize_checkpoint(folders.packed, folders.floats)
    model, tokens = jaxwna16.load_model(folders.packed, dtype="float32"), random_tokens(2, 24)
    packed = set(make_plan(folders.packed).quantized)
    kept = ("router", "vision", "embed", "lm_head")
    assert packed and not any(part in path for path in packed for part in kept)
    ours = forward(model, jnp.asarray(tokens))
    if model_type == "gemma4":  # transformers does not read experts that are apart
        floats = jaxwna16.load_model(folders.floats, dtype="float32")
        expected = np.asarray(forward(floats, jnp.asarray(tokens)))
    else:
        expected = reference_logits(load_reference(folders), tokens)
    assert relative_error(ours, expected) < 1e-4
    written = generate_tokens(model, tokens[:1, :8].tolist(), max_new_tokens=4).tokens
    assert written[0][0] == forward(model, jnp.asarray(tokens[:1, :8]))[0, -1].argmax()


def test_keys_of_layers_that_share_are_left_out_and_listed(tmp_path):
    row = ROWS["gemma4_text"]
    folder = write_row(make_reference(BASES["gemma4_text"]), row, tmp_path).packed
    expected = nnx.state(jaxwna16.load_model(folder, dtype="float32"))
    names = ("k_proj", "v_proj", "k_norm")

    def add(tensors):
        first = f"{LAYERS}.0.self_attn."
        extra = {n: t for n, t in tensors.items() if n.startswith(tuple(first + p for p in names))}
        assert len(extra) > 6
        return tensors | {n.replace(".0.", ".2."): t for n, t in extra.items()}

    found = jaxwna16.load_model(rewrite(folder, add), dtype="float32")
    jax.tree.map(assert_same_bits, nnx.state(found), expected)
    [warning] = [w for w in found.warnings if "not loaded" in w]
    assert warning.startswith(f"{LAYERS}.2.self_attn")
    assert "these layers attend to the keys of layer 0" in warning


def test_wrapped_linears_of_a_tower_are_ignored_by_their_own_names(tmp_path):
    """As in Google's files: each by its name, which ends in `.linear`."""
    folder = write_row(make_reference(BASES["gemma4"]), ROWS["gemma4"], tmp_path).packed
    names = load_file(folder / "model.safetensors")
    wrapped = [n.removesuffix(".weight") for n in names if n.endswith(".linear.weight")]
    assert len(wrapped) > 5
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization["ignore"] = [
        *(entry for entry in quantization["ignore"] if "vision_tower" not in entry),
        *wrapped,
        "model.vision_tower.patch_embedder.input_proj",
    ]
    (folder / "config.json").write_text(json.dumps(config))
    [warning] = jaxwna16.load_model(folder, dtype="float32").warnings
    assert "the vision tower" in warning
