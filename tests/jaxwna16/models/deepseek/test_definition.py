"""Latent attention in a model: its cache, and what files may pack of it."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressed_tensors.quantization import QuantizationArgs

import jaxwna16
from jaxwna16.cli.rows import list_module_rows
from jaxwna16.generation.tokens import generate_tokens
from jaxwna16.layers.dense import QuantDense
from loaders.open import open_plan
from tests.jaxwna16.models.family_rows import BASES, MODELS, ROWS
from tests.jaxwna16.models.family_rows.deepseek import LATENT
from tests.jaxwna16.models.family_rows.deepseek import ROWS as OWN
from tests.jaxwna16.models.hf_checkpoints import load_reference, write_folders, write_row
from tests.jaxwna16.models.hf_models import (
    choose_experts,
    convert,
    generate_reference,
    make_reference,
    random_tokens,
    record_routers,
    reference_logits,
    relative_error,
    run_logits,
    run_pieces,
)

KIMI = (
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    "lm_head",
)
"""The ignore list of Kimi-K2-Thinking."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """As Kimi K2 is published: int4 experts in symmetric groups of 32, all else plain."""
    reference = make_reference(BASES["deepseek_v3"], rms_norm_eps=1e-5, moe_intermediate_size=64)
    args = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True)
    folders = write_folders(reference, tmp_path_factory.mktemp("kimi"), args, ignore=KIMI)
    path = folders.packed / "config.json"
    config = json.loads(path.read_text())
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    path.write_text(json.dumps({**config, "model_type": "kimi_k2", "auto_map": code}))
    return folders


def test_the_cache_holds_a_latent_and_a_rotated_key_a_token_and_nothing_else():
    model = convert(make_reference(BASES["deepseek_v3"]), dtype=jnp.bfloat16)
    cache = jax.eval_shape(lambda: model.make_cache(3, 40))
    assert len(cache) == LATENT["num_hidden_layers"]
    for layer in cache:
        assert [leaf.shape for leaf in jax.tree.leaves(layer)] == [
            (3, 40, LATENT["kv_lora_rank"]),
            (3, 40, LATENT["qk_rope_head_dim"]),
        ]
        assert {leaf.dtype for leaf in jax.tree.leaves(layer)} == {jnp.dtype("bfloat16")}


def test_a_kimi_k2_whose_experts_alone_are_packed_is_that_of_transformers(folders):
    reference = load_reference(folders)
    model = jaxwna16.load_model(folders.packed, dtype="float32")
    tokens = generate_reference(reference, random_tokens(2, 9), 24)
    stream = run_pieces(model, tokens, [9, *[1] * 15])
    logits = run_logits(model, stream)
    assert relative_error(logits, reference_logits(reference, tokens)) < 1e-4
    result = generate_tokens(model, tokens[:1, :9].tolist(), max_new_tokens=15)
    assert result.tokens == [tokens[0, 9:].tolist()]


@pytest.mark.parametrize("name", [name for name, (kind, _) in MODELS.items() if kind in OWN])
def test_the_chosen_experts_and_their_weights_are_those_of_transformers(name):
    reference = make_reference(name)
    model = convert(reference)
    seen = record_routers(reference, random_tokens(4, 16))
    assert list(seen) == [i for i, sparse in enumerate(model.config.moe.sparse) if sparse]
    for layer, router in seen.items():
        ids, weights = choose_experts(model, layer, router.hidden)
        np.testing.assert_array_equal(ids, router.ids)
        np.testing.assert_allclose(weights, router.weights, rtol=1e-4)
        assert len(np.unique(ids)) > ids.shape[1]  # not one choice for all tokens


def test_what_makes_latents_stays_packed_and_what_takes_them_is_floats_of_stated_bytes(tmp_path):
    folder = write_row(make_reference(BASES["deepseek_v3"]), ROWS["deepseek_v3"], tmp_path).packed
    attention = jaxwna16.load_model(folder).model.layers[0].self_attn
    packed = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    assert all(type(getattr(attention, name)) is QuantDense for name in packed)
    heads, rank = LATENT["num_attention_heads"], LATENT["kv_lora_rank"]
    assert attention.k_b_proj.weight.shape == (heads * LATENT["qk_nope_head_dim"], rank)
    assert attention.v_b_proj.weight.shape == (heads * LATENT["v_head_dim"], rank)
    plan = open_plan(folder)
    [row] = [
        row
        for row in list_module_rows(plan, {}, "bfloat16", "")
        if row["modules"].endswith(".kv_b_proj")
    ]
    # of two layers
    assert row["reason"].endswith(f"({2 * heads * 40 * rank * 2:,} bytes)")
