"""Latent attention in a model: its cache, its experts, and what files may pack of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwna16
from jaxwna16.cli.rows import list_module_rows
from jaxwna16.layers.dense import QuantDense
from loaders.open import open_plan
from tests.jaxwna16.models.family_rows import BASES, MODELS, ROWS
from tests.jaxwna16.models.family_rows.deepseek import LATENT
from tests.jaxwna16.models.family_rows.deepseek import ROWS as OWN
from tests.jaxwna16.models.hf_checkpoints import write_row
from tests.jaxwna16.models.hf_models import (
    choose_experts,
    convert,
    make_reference,
    random_tokens,
    record_routers,
)


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
