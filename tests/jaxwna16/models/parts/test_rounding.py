"""How single parts round in 16 bits, against torch and transformers: bit for bit where they can be.

`test_family_rounding` does the same with the norms and the rotated keys of each family.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.glm4 import modeling_glm4
from transformers.models.llama import modeling_llama
from transformers.models.qwen3_5 import modeling_qwen3_5

from jaxwna16.layers.fused import gated
from jaxwna16.models.parts.layers import Embedding, OffsetRMSNorm, RMSNorm
from pallas_kernels.formulas.activations import round_sigmoid
from pallas_kernels.formulas.rotation import rotate
from pallas_kernels.step.routing import route
from pallas_kernels.xla.delta_rule import convolve
from tests.jaxwna16.models.rounding import count_steps, draw_exact, draw_normal, round_to

DTYPES = ["bfloat16", "float16"]
FLIPS = 2e-3
"""The share of results that may be a step away, where both hang on an exponential: its last bit of
float32 differs between torch and XLA, which rounds one in some thousands to the other side. A
sigmoid in 16 bits would move one in three."""


def assert_nearly_same(ours: jax.Array, theirs: torch.Tensor, most: int = 1) -> None:
    """`most` steps apart: 1 of what rounds once, 2 of its product, whose steps may be half as
    large."""
    steps = count_steps(ours, theirs)
    assert (steps > 0).mean() <= FLIPS
    assert steps.max() <= most


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_norms_are_told_apart_by_where_they_round(dtype):
    """So that the comparison of each with its own in transformers can fail."""
    x, weight = draw_exact((64, 64), dtype), draw_normal((64,), dtype)
    own = RMSNorm(64, 1e-6, dtype=jnp.dtype(dtype))
    own.weight[...] = weight.ours
    other = OffsetRMSNorm(64, 1e-6, dtype=jnp.dtype(dtype))
    other.weight[...] = (weight.ours.astype(jnp.float32) - 1).astype(dtype)
    theirs = modeling_llama.LlamaRMSNorm(64, eps=1e-6)
    theirs.weight = torch.nn.Parameter(weight.theirs)
    assert count_steps(own(x.ours), theirs(x.theirs)).max() == 0
    assert (count_steps(other(x.ours), theirs(x.theirs)) > 0).mean() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theirs", [modeling_llama, modeling_glm4])
def test_a_rotation_rounds_each_product_and_their_sum(theirs, dtype):
    x = draw_normal((2, 16, 4, 32), dtype)
    angles = np.random.default_rng(1).uniform(-20, 20, (2, 16, 16))
    both = np.concatenate([angles, angles], axis=-1)
    cos, sin = (round_to(dtype, f(both)) for f in (np.cos, np.sin))
    heads_first = x.theirs.transpose(1, 2)
    expected, _ = theirs.apply_rotary_pos_emb(heads_first, heads_first, cos.theirs, sin.theirs)
    paired = theirs is modeling_glm4
    ours = rotate(x.ours, cos.ours[..., :16], sin.ours[..., :16], paired=paired)
    assert count_steps(ours, expected.transpose(1, 2)).max() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_is_rounded_and_then_its_product_with_up(dtype):
    """That of two packed layers rounds once, see `gated`; no module of transformers is its like."""
    gate, up = draw_normal((64, 64), dtype), draw_normal((64, 64), dtype, seed=1)
    ours = gated(gate.ours, lambda x: x, lambda _: up.ours)
    assert_nearly_same(ours, torch.nn.functional.silu(gate.theirs) * up.theirs, most=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_rounded_and_then_its_product_with_up(dtype):
    gate, up = draw_normal((64, 64), dtype), draw_normal((64, 64), dtype, seed=1)
    ours = gated(gate.ours, lambda x: x, lambda _: up.ours, "gelu_tanh")
    assert_nearly_same(ours, ACT2FN["gelu_pytorch_tanh"](gate.theirs) * up.theirs, most=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounds", [False, True])
def test_a_multiplier_of_the_embedding_is_rounded_first_by_gemma_and_not_by_granite(dtype, rounds):
    table, tokens, scale = draw_normal((64, 80), dtype), np.arange(64), 80**0.5
    theirs = modeling_gemma2.Gemma2TextScaledWordEmbedding(64, 80, 0, scale)
    theirs.weight = torch.nn.Parameter(table.theirs)
    expected = theirs(torch.from_numpy(tokens)) if rounds else table.theirs * scale
    rounded = float(np.asarray(scale, jnp.dtype(dtype))) if rounds else scale
    ours = Embedding(64, 80, dtype=jnp.dtype(dtype), multiplier=rounded)
    ours.weight[...] = table.ours
    assert count_steps(ours(jnp.asarray(tokens)), expected).max() == 0
    ours.multiplier = scale if rounds else float(np.asarray(scale, jnp.dtype(dtype)))
    assert (count_steps(ours(jnp.asarray(tokens)), expected) > 0).mean() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_qwen_are_rounded_sigmoids(dtype):
    gate, x = draw_normal((64, 64), dtype), draw_normal((64, 64), dtype, seed=1)
    assert_nearly_same(round_sigmoid(gate.ours), gate.theirs.sigmoid())
    expected = x.theirs * torch.sigmoid(gate.theirs)
    assert_nearly_same(x.ours * round_sigmoid(gate.ours), expected, most=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution_is_rounded_and_then_its_silu(dtype):
    x, weight = draw_exact((2, 9, 32), dtype), draw_exact((32, 4), dtype, seed=1)
    before = draw_exact((2, 3, 32), dtype, seed=2)
    ours, _ = convolve(x.ours, weight.ours, before.ours, jnp.full(2, 9, jnp.int32))
    expected = modeling_qwen3_5.causal_conv1d_update(
        x.theirs.transpose(1, 2),
        before.theirs.transpose(1, 2).contiguous(),
        weight.theirs,
        None,
        "silu",
    )
    assert_nearly_same(ours, expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_a_router_are_float32_whatever_the_logits_are(dtype):
    """A softmax ends in a sum and exponentials, which torch and XLA round differently: 4 bits."""
    logits = draw_normal((64, 8), dtype)
    _, weights = route(logits.ours, top_k=8, renormalize=False)
    expected = torch.softmax(logits.theirs.float(), dim=-1).sort(descending=True)[0]
    np.testing.assert_array_max_ulp(np.asarray(weights), expected.numpy(), maxulp=16)
