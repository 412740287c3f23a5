"""`route` chooses each token's experts and their weights, in float32.

    scores   s = softmax(logits) | sigmoid(logits) | sqrt(softplus(logits))
    choice   c = s + correction_bias
    groups   consecutive experts form `groups` groups; the score of a group is its largest c, or
             the sum of its two largest; only experts of the best `top_groups` groups remain
    chosen   the top_k remaining experts of largest c
    weights  s of the chosen, divided by their sum if `renormalize`, times `scaling_factor`

Mixtral and Qwen-MoE are softmax without groups; DeepSeek-V2 (https://arxiv.org/abs/2405.04434) is
softmax with groups by their best; DeepSeek-V3 (https://arxiv.org/abs/2412.19437) is sigmoid with a
correction bias and groups by their two best. A softmax over the chosen alone (gpt-oss) is softmax
with `renormalize`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backends import check_backend
from pallas_kernels.errors import BackendError, SpecError
from pallas_kernels.formulas.routing_options import Routing
from pallas_kernels.lowering import choose_at_lowering, has_symbolic
from pallas_kernels.vmap_rule import fold_vmap
from pallas_kernels.xla.routing import choose_experts


def route(
    router_logits: jax.Array,
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    correction_bias: jax.Array | None = None,
    scaling_factor: float = 1.0,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Choose the experts of every token. `Routing` explains the options, the module the formulas.

    Differentiable with respect to the logits through the weights. Of equal experts or groups, the
    lower number comes first. Experts are equal if their float32 c is equal, even if their logits
    differ (from 18 on every sigmoid is 1).

    A token with a NaN or infinite score, or a NaN in c, gets the experts 0 .. top_k - 1 with NaN
    weights, so that it is noticed. The cause is a NaN in its logits or in `correction_bias`, a
    logit of +inf under softmax or sqrt_softplus, or logits that are all -inf under softmax. In all
    other cases a logit of -inf gives a score of 0, and +inf under sigmoid a score of 1. An expert
    with a bias of -inf is the last of its group, one with +inf the first.

    Args:
      router_logits: float [..., E].
      correction_bias: float [E], added to the scores for the choice only.
      backend: None, "triton" or "xla", see `quant_matmul`; logits of every dtype can have either.

    Returns:
      ids int32 [..., top_k], best first, and weights float32 [..., top_k].

    Raises:
      SpecError: if options and shapes contradict each other.
      BackendError: if the named backend does not exist or cannot do it.

    Example:
      ```python
      logits = jnp.asarray([[0.0, 3.0, 1.0, 2.0]])
      ids, weights = jaxwna16.route(logits, top_k=2)
      assert ids.tolist() == [[1, 3]]
      assert abs(weights.sum() - 1) < 1e-6
      ```
    """
    routing = Routing(
        top_k=top_k,
        scoring=scoring,
        renormalize=renormalize,
        groups=groups,
        top_groups=top_groups,
        group_score=group_score,
        scaling_factor=scaling_factor,
    )
    logits = jnp.asarray(router_logits)
    if logits.ndim < 1 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise SpecError(
            f"router_logits must be float [..., E], got {logits.dtype} {list(logits.shape)}"
        )
    experts = logits.shape[-1]
    routing.check_experts(experts)
    bias = None
    if correction_bias is not None:
        bias = jnp.asarray(correction_bias)
        if bias.shape != (experts,) or not jnp.issubdtype(bias.dtype, jnp.floating):
            raise SpecError(
                f"correction_bias must be float [{experts}], got {bias.dtype} {list(bias.shape)}"
            )
        bias = bias.astype(jnp.float32)
    check_backend(backend)
    lead, rows = logits.shape[:-1], logits.reshape(-1, experts)
    ids, weights = _choose_form(routing, rows, backend)(rows, bias)
    return ids.reshape(*lead, top_k), weights.reshape(*lead, top_k)


def _choose_form(routing: Routing, rows: jax.Array, backend: str | None) -> Callable[..., Any]:
    """The function (logits [T, E], bias) for this backend.

    The kernel is for any number of tokens. A few hundred of them take the time of one, since each
    is one warp. Above that, it executes about as many instructions as XLA's sort of E numbers does,
    but in one kernel that reads the logits once instead of about eight.
    """
    by_xla = functools.partial(_choose_by_xla, routing)
    if has_symbolic(rows.shape) and backend == "triton":
        raise BackendError(
            f'backend "triton" needs a known number of tokens, got router_logits '
            f"{list(rows.shape)}: export the function once for each number of tokens"
        )
    if has_symbolic(rows.shape) or not rows.shape[0]:
        return by_xla
    return choose_at_lowering(by_xla, functools.partial(_choose_by_triton, routing), backend)


def _choose_by_xla(routing: Routing, rows: jax.Array, bias: jax.Array | None) -> tuple:
    return choose_experts(rows, routing, bias)


def _choose_by_triton(
    routing: Routing, rows: jax.Array, bias: jax.Array | None, *, interpret: bool
) -> tuple:
    # imported here, so that all else works where a later jax has no Pallas-Triton
    from pallas_kernels.triton.step.routing import choose_experts as choose_by_triton

    def run(rows: jax.Array, bias: jax.Array | None) -> tuple:
        return choose_by_triton(rows, routing, bias, interpret=interpret)

    return fold_vmap(run)(rows, bias)
