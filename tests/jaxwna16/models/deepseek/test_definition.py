"""Latent attention in a model: its cache, its experts, and what files may pack of it."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxwna16
from jaxwna16.cli.rows import list_module_rows
from jaxwna16.layers.dense import QuantDense
from jaxwna16.models.causal_lm import CausalLM
from loaders.open import open_plan
from tests.jaxwna16.models.family_rows import BASES, ROWS
from tests.jaxwna16.models.family_rows.deepseek import LATENT
from tests.jaxwna16.models.hf_checkpoints import write_row
from tests.jaxwna16.models.hf_models import (
    cast_weights,
    convert,
    make_reference,
    random_tokens,
)
from tests.jaxwna16.models.rounding import count_steps
from tests.jaxwna16.models.test_family_rounding import FLIPS


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


@pytest.mark.parametrize(
    ("model_type", "rotate"),
    [("deepseek_v3", "apply_rotary_pos_emb_interleave"), ("deepseek_v2", "apply_rotary_emb")],
)
def test_rotated_keys_round_as_those_of_transformers(model_type, rotate, monkeypatch):
    """Of one layer, whose projection only chooses features, so that it does not round."""
    reference = make_reference(BASES[model_type], num_hidden_layers=1)
    projection = reference.model.layers[0].self_attn.kv_a_proj_with_mqa.weight
    with torch.no_grad():
        projection.copy_(torch.eye(*projection.shape))
    model = convert(reference, dtype=jnp.bfloat16)
    module, turned = sys.modules[type(reference).__module__], []
    theirs = getattr(module, rotate)

    def record(*arguments):
        turned.append(theirs(*arguments)[1])
        return theirs(*arguments)

    monkeypatch.setattr(module, rotate, record)
    tokens = random_tokens(1, 24)
    with torch.no_grad():
        cast_weights(reference, torch.bfloat16)(torch.from_numpy(tokens).long())
    start, count = jnp.zeros(1, jnp.int32), jnp.full(1, 24, jnp.int32)
    options = {"xla_allow_excess_precision": False}
    run = jax.jit(CausalLM.hidden, compiler_options=options)
    _, cache = run(model, jnp.asarray(tokens), start, count, model.make_cache(1, 24))
    ours = np.asarray(cache[0].key[0], np.float32)
    if model_type == "deepseek_v3":  # which has the first of each pair before the second
        ours = np.concatenate([ours[:, 0::2], ours[:, 1::2]], axis=-1)
    steps = count_steps(jnp.asarray(ours, jnp.bfloat16), turned[0][0, 0])
    assert (steps > 0).mean() <= FLIPS
