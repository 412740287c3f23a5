"""How the parts of each family round in 16 bits, against transformers' own modules.

The bound on the logits of a whole model in bfloat16 cannot show it: a norm that rounds before it
multiplies by the weight, and not after, changes a quarter of its results by one step, which is no
more than other orders of summation do.

XLA may keep more digits than the program says (`xla_allow_excess_precision`) where operations are
compiled together. Here it may not, since it is the program that is compared.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.families import find_family
from jaxwna16.models.filling.renaming import rename
from jaxwna16.models.wrapped.table import WRAPPERS
from tests.jaxwna16.models.family_rows import BASES, ROWS
from tests.jaxwna16.models.family_rows.deepseek import ROWS as LATENT
from tests.jaxwna16.models.hf_models import cast_weights, convert, make_reference, random_tokens
from tests.jaxwna16.models.rounding import count_steps, draw_exact, round_to

as_written = {"xla_allow_excess_precision": False}
LENGTH = 24
ALIKE = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "dots1", "qwen3_5_moe_text", "qwen3_next"),
    *(name for name in WRAPPERS if name != "glm4v"),
)
"""They have experts, or a tower, and the attention of another row."""
FLIPS = 4e-3
"""The share of results that may be a step away where they hang on a sigmoid, a cosine, an inverse
root or a sum of inexact terms. Of these, the last bits of float32 differ between torch and XLA; a
result is then rounded to the other side where it was within some 2^-24 of the middle of two steps
2^-8 or 2^-11 apart: one in 8,000 for 16-bit floats of 11 digits, of which several follow each
other. A wrong order of rounding moves one in four."""


def list_norms(reference, model: CausalLM) -> Iterator[tuple[str, Any, Any]]:
    """The path of each kind of norm and width once, and both modules."""
    names = find_family(reference.config.to_dict()).names
    theirs = {rename(path, names): module for path, module in reference.named_modules()}
    seen = set()
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        kind = (type(module), getattr(module, "weight", None) is not None and module.weight.shape)
        if type(module).__name__.endswith("Norm") and kind not in seen:
            seen.add(kind)
            yield name, module, theirs[name]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ROWS)
def test_norms_round_as_those_of_transformers(model_type, dtype):
    reference = make_reference(BASES[model_type])
    model = convert(reference, dtype=dtype)
    found = list(list_norms(cast_weights(reference, getattr(torch, dtype)), model))
    assert found
    for path, ours, theirs in found:
        # sums of squares are exact in any order, so that nothing else can differ
        x = draw_exact((16, theirs.weight.shape[0]), dtype)
        is_gated = "Gated" in type(theirs).__name__
        gates = [round_to(dtype, 2 * np.sin(np.arange(x.ours.size)).reshape(x.ours.shape))]
        inputs = [x, *(gates if is_gated else [])]
        run = jax.jit(lambda norm, *xs: norm(*xs), compiler_options=as_written)
        with torch.no_grad():
            expected = theirs(*(part.theirs for part in inputs))
        steps = count_steps(run(ours, *(part.ours for part in inputs)), expected)
        assert (steps > 0).mean() <= FLIPS, path
        assert steps.max() <= 2, path  # one, times a weight: steps there may be half as large


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=[pytest.mark.thorough] if is_alike else [])
        for name, row in ROWS.items()
        if name not in LATENT  # `deepseek/test_definition.py` has them
        for is_alike in [name in ALIKE or row.is_repeated]
    ],
)
def test_rotated_keys_round_as_those_of_transformers(model_type, monkeypatch):
    """Of one layer, whose projection only chooses features, so that it does not round."""
    facts = {**ROWS[model_type].sizes, **next(iter(ROWS[model_type].variants.values()))}
    changes = {"layer_types": ["full_attention"], "num_kv_shared_layers": 0}
    changes = {key: value for key, value in changes.items() if key in facts}
    reference = make_reference(BASES[model_type], num_hidden_layers=1, **changes)
    names = find_family(reference.config.to_dict()).names
    layers = {rename(path, names): module for path, module in reference.named_modules()}
    attention = layers["model.layers.0.self_attn"]
    with torch.no_grad():
        keys = find_keys(attention)
        keys.copy_(torch.eye(*keys.shape))
    model = convert(reference, dtype=jnp.bfloat16)
    module, turned = sys.modules[type(attention).__module__], []
    rotate = module.apply_rotary_pos_emb

    def record(*arguments, **options):
        found = rotate(*arguments, **options)
        # Gemma 4 turns queries and then keys, heads behind tokens
        keys = found[1] if isinstance(found, tuple) else found.transpose(1, 2)
        turned.insert(0, keys)
        return found

    if model.model.layers[0].self_attn.heads.norms_last:
        norm = layers["model.layers.0.self_attn.k_norm"]
        norm.register_forward_hook(lambda _, __, keys: turned.append(keys))
    else:
        monkeypatch.setattr(module, "apply_rotary_pos_emb", record)
    tokens = random_tokens(1, LENGTH)
    with torch.no_grad():
        cast_weights(reference, torch.bfloat16)(torch.from_numpy(tokens).long())
    start, count = jnp.zeros(1, jnp.int32), jnp.full(1, LENGTH, jnp.int32)
    run = jax.jit(CausalLM.hidden, compiler_options=as_written)
    _, cache = run(model, jnp.asarray(tokens), start, count, model.make_cache(1, LENGTH))
    steps = count_steps(cache[0].k, turned[0][0])
    assert (steps > 0).mean() <= FLIPS


def find_keys(attention: torch.nn.Module) -> torch.Tensor:
    """The weight that projects keys, which may be rows of a larger one (Phi-3)."""
    if hasattr(attention, "k_proj"):
        return attention.k_proj.weight
    config, size = attention.config, attention.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    return attention.qkv_proj.weight[queries : queries + keys]
