"""The sparse block of a layer: a router, experts, and shared experts that serve every token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwna16.layers.moe import QuantMoE, weigh_shared
from jaxwna16.models.config.moe_config import MoeConfig
from jaxwna16.models.parts.layers import MLP, Dense, Linears, multiply
from pallas_kernels.formulas.norms import Onto
from pallas_kernels.moe import Options, float_moe, quant_moe
from pallas_kernels.step.residual import add_onto, run_experts_onto
from pallas_kernels.step.routing import route

Array = jax.Array


class SparseBlock(nnx.Module):
    """The chosen experts' sum, plus the shared experts; paths are those of the checkpoint."""

    def __init__(self, moe: MoeConfig, hidden: int, linears: Linears, path: str):
        self.gate = Router(moe, hidden, dtype=linears.dtype)
        self.experts = make_experts(moe, hidden, linears, f"{path}.experts")
        self.shared = moe.shared
        if moe.shared is not None:
            inner = moe.shared_intermediate_size
            setattr(self, moe.shared, MLP(hidden, inner, False, linears, f"{path}.{moe.shared}"))
        # floats: one output feature is too few for a kernel
        self.shared_expert_gate = (
            Dense(1, hidden, use_bias=False, dtype=linears.dtype) if moe.shared_gate else None
        )

    def __call__(self, x: Array) -> Array:
        gate = self.shared_expert_gate
        return self.experts(
            x,
            self.gate(x),
            correction_bias=self.gate.read_bias(),
            shared=None if self.shared is None else getattr(self, self.shared)(x),
            shared_gate=None if gate is None else gate(x),
        )

    def list_words(self) -> tuple[Array, ...]:
        """None: nobody knows yet which experts come next."""
        return ()

    def run_onto(self, x: Array, onto: Onto) -> tuple[Array, Array | None]:
        """Add the result for x to a stream; see `project_onto`."""
        experts, gate = self.experts, self.shared_expert_gate
        if type(experts) is not QuantMoE:
            return add_onto(self(x), onto, backend=experts.backend)
        options = experts.options
        ids, factors = route(
            self.gate(x),
            correction_bias=self.gate.read_bias(),
            backend=options.backend,
            **dataclasses.asdict(options.routing),
        )
        return run_experts_onto(
            x,
            ids,
            factors,
            experts.w13.weights,
            experts.w2.weights,
            experts.spec13,
            experts.spec2,
            onto,
            options=Options(options.activation, options.gated, options.interleaved, options.weigh),
            shared=None if self.shared is None else getattr(self, self.shared)(x),
            shared_gate=None if gate is None else gate(x),
            backend=options.backend,
        )


class Router(nnx.Module):
    """Logits [..., E] of x [..., H]; floats, also where files hold them packed.

    Attributes:
      weight: [E, H].
      e_score_correction_bias: float32 [E], in some files [1, E], counts for the choice of experts
        and not for their weights; None without. It is no `nnx.Param`, since the loss has no
        gradient in it.
    """

    def __init__(self, moe: MoeConfig, hidden: int, *, dtype):
        dtype = jnp.float32 if moe.keeps_router else dtype
        self.weight = nnx.Param(jnp.zeros((moe.experts, hidden), dtype))
        shape = (*moe.bias_lead, moe.experts)
        self.e_score_correction_bias = (
            nnx.Variable(jnp.zeros(shape, jnp.float32)) if moe.correction_bias else None
        )
        self.wide = moe.wide_router

    def __call__(self, x: Array) -> Array:
        """Logits in float32 where the family computes them so, else in the dtype of x."""
        weight = self.weight[...]
        if self.wide:
            return multiply(x.astype(jnp.float32), weight.astype(jnp.float32))
        return multiply(x, weight).astype(x.dtype)

    def read_bias(self) -> Array | None:
        """The correction bias [E], if there is one."""
        bias = self.e_score_correction_bias
        return None if bias is None else bias[...].reshape(-1)


class FloatStack(nnx.Module):
    """The weights [E, N, K] of one product of all experts."""

    def __init__(self, experts: int, out_features: int, in_features: int, *, dtype):
        self.weight = nnx.Param(jnp.zeros((experts, out_features, in_features), dtype))


class FloatExperts(nnx.Module):
    """Experts that are floats in the model; called as `QuantMoE` is."""

    def __init__(
        self,
        moe: MoeConfig,
        hidden: int,
        *,
        dtype,
        backend: str | None = None,
        activation: str = "silu",
    ):
        inner = moe.intermediate_size
        self.backend = backend
        self.w13 = FloatStack(moe.experts, 2 * inner, hidden, dtype=dtype)
        self.w2 = FloatStack(moe.experts, hidden, inner, dtype=dtype)
        self.routing, self.backend, self.activation = moe.routing, backend, activation

    def __call__(
        self,
        x: Array,
        router_logits: Array,
        *,
        correction_bias: Array | None = None,
        shared: Array | None = None,
        shared_gate: Array | None = None,
    ) -> Array:
        options = dataclasses.asdict(self.routing)
        ids, weights = route(
            router_logits, correction_bias=correction_bias, backend=self.backend, **options
        )
        return run_chosen(self, x, ids, weights, weigh_shared(shared, shared_gate))


def run_chosen(
    experts: QuantMoE | FloatExperts,
    x: Array,
    ids: Array,
    weights: Array,
    shared: Array | None = None,
) -> Array:
    """The sum [..., H] of experts that were chosen already, ids and weights [..., top_k]."""
    if isinstance(experts, FloatExperts):
        stacks = experts.w13.weight[...], experts.w2.weight[...]
        return float_moe(x, ids, weights, *stacks, activation=experts.activation, shared=shared)
    return quant_moe(
        x,
        ids,
        weights,
        experts.w13.weights,
        experts.w2.weights,
        experts.spec13,
        experts.spec2,
        activation=experts.options.activation,
        shared=shared,
        backend=experts.options.backend,
    )


def make_experts(
    moe: MoeConfig, hidden: int, linears: Linears, path: str, activation: str = "silu"
) -> Any:
    """`QuantMoE` where the specs name both products of the experts, else `FloatExperts`."""
    spec13 = linears.find_spec(f"{path}.w13", 2 * moe.intermediate_size, hidden)
    spec2 = linears.find_spec(f"{path}.w2", hidden, moe.intermediate_size)
    if spec13 is None or spec2 is None:
        options = {"dtype": linears.dtype, "backend": linears.backend}
        return FloatExperts(moe, hidden, activation=activation, **options)
    return QuantMoE(
        spec13,
        spec2,
        experts=moe.experts,
        dtype=linears.dtype,
        backend=linears.backend,
        activation=activation,
        **dataclasses.asdict(moe.routing),
    )
