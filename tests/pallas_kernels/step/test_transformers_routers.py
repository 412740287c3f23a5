"""`route` chooses and weighs as the routers of transformers do, family by family.

A router's weight is the identity here, so that what goes in are its logits, exactly.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from pallas_kernels import route

U = 2.0**-24
E, TOP_K, TOKENS = 16, 4, 400
GROUPS = {"n_group": 4, "topk_group": 2}


def make_router(cls: type, config: type, **options):
    """A router of E experts that takes logits."""
    counts = {"num_local_experts": E, "num_experts": E, "n_routed_experts": E}
    sizes = {"hidden_size": E, "num_attention_heads": 2, "num_experts_per_tok": TOP_K}
    made = config(**sizes, **counts, **options)
    # some derive one of the names from another
    assert E in (getattr(made, "num_experts", None), getattr(made, "num_local_experts", None))
    router = cls(made).requires_grad_(False)
    router.weight.copy_(torch.eye(E))
    if getattr(router, "bias", None) is not None:
        router.bias.zero_()
    return router


def make_logits(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(TOKENS, E)).astype(np.float32)


def assert_same_choice(router, logits: np.ndarray, *, ordered: bool, **options) -> None:
    """Identical experts of both forms, in order where the router orders them.

    Weights: here and there each score is good to 16 u and the sum and quotient add k + 4, see
    `test_routing`.
    """
    _, their_weights, their_ids = (a.numpy() for a in router(torch.from_numpy(logits)))
    if not ordered:
        their_ids, their_weights = sort_by_expert(their_ids, their_weights)
    for backend in ("xla", "triton"):
        found = route(jnp.asarray(logits), top_k=TOP_K, backend=backend, **options)
        ids, weights = map(np.asarray, found)
        if not ordered:
            ids, weights = sort_by_expert(ids, weights)
        np.testing.assert_array_equal(ids, their_ids)
        np.testing.assert_allclose(weights, their_weights, rtol=2 * (84 + TOP_K) * U, atol=0)
        assert len(np.unique(ids)) == E


def sort_by_expert(ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = ids.argsort(1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)


def test_mixtral():
    router = make_router(MixtralTopKRouter, transformers.MixtralConfig)
    assert_same_choice(router, make_logits(), ordered=True)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (Qwen2MoeTopKRouter, transformers.Qwen2MoeConfig),
        (Qwen3MoeTopKRouter, transformers.Qwen3MoeConfig),
    ],
)
def test_qwen_moe(cls, config, renormalize):
    router = make_router(cls, config, norm_topk_prob=renormalize)
    assert_same_choice(router, make_logits(), ordered=True, renormalize=renormalize)


def test_gpt_oss_whose_softmax_over_the_chosen_is_a_renormalized_one():
    router = make_router(GptOssTopKRouter, transformers.GptOssConfig)
    assert_same_choice(router, make_logits(), ordered=True)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2(method):
    """Its masked scores are 0.0, ours -inf: the same, since every softmax is above 0 here."""
    options = {"topk_method": method, "routed_scaling_factor": 16.0, **GROUPS}
    router = make_router(DeepseekV2TopkRouter, transformers.DeepseekV2Config, **options)
    groups = {} if method == "greedy" else {"groups": 4, "top_groups": 2, "group_score": "max"}
    assert_same_choice(
        router,
        make_logits(),
        ordered=False,
        renormalize=False,
        scaling_factor=16.0,
        **groups,
    )


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_deepseek_v3(renormalize, shift):
    """The correction bias makes choice scores negative, where masked ones of 0.0 (as transformers
    wrote before it took -inf, too) would win."""
    options = {"norm_topk_prob": renormalize, "routed_scaling_factor": 2.5, **GROUPS}
    router = make_router(DeepseekV3TopkRouter, transformers.DeepseekV3Config, **options)
    bias = (np.random.default_rng(1).normal(size=E) * 0.1 + shift).astype(np.float32)
    router.e_score_correction_bias.copy_(torch.from_numpy(bias))
    assert_same_choice(
        router,
        make_logits(),
        ordered=False,
        scoring="sigmoid",
        renormalize=renormalize,
        groups=4,
        top_groups=2,
        group_score="top2_sum",
        correction_bias=jnp.asarray(bias),
        scaling_factor=2.5,
    )


def test_deepseek_v4_whose_scores_are_roots_of_softplus():
    options = {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5}
    router = make_router(DeepseekV4TopKRouter, transformers.DeepseekV4Config, **options)
    bias = (np.random.default_rng(1).normal(size=E) * 0.1).astype(np.float32)
    router.e_score_correction_bias.copy_(torch.from_numpy(bias))
    assert_same_choice(
        router,
        make_logits(),
        ordered=False,
        scoring="sqrt_softplus",
        correction_bias=jnp.asarray(bias),
        scaling_factor=1.5,
    )


def test_llama4_whose_router_gives_the_sigmoids_of_the_chosen():
    """It chooses by logits, we by their sigmoids: the same while no two of these round alike."""
    router = make_router(Llama4Router, transformers.Llama4TextConfig)
    logits = make_logits()
    their_scores = router(torch.from_numpy(logits))[0].numpy()
    ids, weights = route(jnp.asarray(logits), top_k=TOP_K, scoring="sigmoid", renormalize=False)
    scores = np.zeros_like(their_scores)
    np.put_along_axis(scores, np.asarray(ids), np.asarray(weights), axis=1)
    assert ((their_scores > 0).sum(1) == TOP_K).all()
    np.testing.assert_allclose(scores, their_scores, rtol=2 * (84 + TOP_K) * U, atol=0)
