"""`QuantMoE` for Flax NNX: the experts of a Mixture-of-Experts layer, packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwna16.layers.dense import (
    QuantParam,
    cast_input,
    check_options,
    choose_bias_dtype,
    constrain,
    make_start,
)
from pallas_kernels.arguments import convert_array
from pallas_kernels.errors import SpecError
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import check_weights, make_abstract
from pallas_kernels.formulas.activations import check as check_activation
from pallas_kernels.formulas.activations import weigh
from pallas_kernels.formulas.routing_options import Routing
from pallas_kernels.moe import quant_moe
from pallas_kernels.step.routing import route

_LEAVES = ("packed", "scale", "zero_point", "bias")
_INTEGERS = ("packed", "zero_point")
_WEIGH = ("output", "input")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """What the experts of a layer compute beside their weights; see `quant_moe` and `route`.

    `dtype` is what x is cast to; None leaves x as it is.
    """

    routing: Routing
    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    weigh: str = "output"
    dtype: Any = None
    backend: str | None = None


EXPERT_OPTIONS = tuple(
    field.name
    for options in (Routing, ExpertOptions)
    for field in dataclasses.fields(options)
    if field.name != "routing"
)
"""What `make_expert_options` takes; the layers of NNX and Linen call them so, too."""


def make_expert_options(**values: Any) -> ExpertOptions:
    """The options of a layer that has each of `EXPERT_OPTIONS` by itself."""
    routing = Routing(
        **{field.name: values.pop(field.name) for field in dataclasses.fields(Routing)}
    )
    return ExpertOptions(routing=routing, **values)


class ExpertStack(nnx.Module):
    """The leaf dict of E experts' weights, E in front of every leaf."""

    def __init__(self, leaves: Mapping[str, jax.ShapeDtypeStruct], metadata: Mapping[str, Any]):
        for name in _LEAVES:
            leaf = None
            if name in leaves:
                kind = QuantParam if name in _INTEGERS else nnx.Param
                kept = {} if name == "bias" else metadata
                leaf = kind(make_start(name, leaves[name]), **kept)
            setattr(self, name, leaf)

    @property
    def weights(self) -> dict[str, jax.Array]:
        """The leaf dict, as `quant_moe` takes it."""
        leaves = {name: getattr(self, name) for name in _LEAVES}
        return {name: leaf.get_value() for name, leaf in leaves.items() if leaf is not None}


class QuantMoE(nnx.Module):
    """y = sum of the chosen experts' act(x @ Wg.T) * (x @ Wu.T) @ Wd.T, weighed by a router.

    The router itself is the model's own linear layer; its logits come in with x:

        y = self.experts(x, self.gate(x))

    Weights start at zero and come from a checkpoint by path, or through `from_weights`. Under
    `nnx.eval_shape` no array is made.

    Attributes:
      w13: gate and up of all experts: `packed` uint16 [E, *spec13.packed_shape] and `zero_point`
        int8 as `QuantParam`, `scale` and `bias` as `nnx.Param`.
      w2: down of all experts.

    Example:
      ```python
      spec13 = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=True, in_features=64, out_features=128
      )
      spec2 = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=True, in_features=64, out_features=64
      )
      w13 = jaxwna16.quantize(jax.random.normal(jax.random.key(0), (4, 128, 64)), spec13)
      w2 = jaxwna16.quantize(jax.random.normal(jax.random.key(1), (4, 64, 64)), spec2)
      experts = jaxwna16.QuantMoE.from_weights(w13, w2, spec13, spec2, top_k=2)
      router = nnx.Linear(64, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
      x = jnp.ones((3, 64), jnp.bfloat16)
      y = experts(x, router(x))
      assert y.shape == (3, 64)
      ```
    """

    def __init__(
        self,
        spec13: QuantSpec,
        spec2: QuantSpec,
        *,
        experts: int,
        top_k: int,
        scoring: str = "softmax",
        renormalize: bool = True,
        groups: int = 1,
        top_groups: int = 1,
        group_score: str = "max",
        scaling_factor: float = 1.0,
        activation: str = "silu",
        gated: bool = True,
        interleaved: bool = False,
        weigh: str = "output",
        use_bias: bool = False,
        scale_dtype: Any = jnp.bfloat16,
        bias_dtype: Any = None,
        dtype: Any = None,
        backend: str | None = None,
        kernel_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        """Make the layer with zero weights.

        Args:
          spec13: of one expert's gate and up, joined along N: N = 2 I (I if not gated), K = H.
          spec2: of one expert's down: N = H, K = I.
          experts: E, how many experts the layer holds.
          top_k, scoring, renormalize, groups, top_groups, group_score, scaling_factor: how experts
            are chosen, see `route`.
          activation, gated, interleaved, weigh: what they compute, see `quant_moe`.
          use_bias: whether both products have biases [E, N].
          scale_dtype: dtype of the scales: float16, bfloat16 or float32.
          bias_dtype: dtype of the biases; None is `dtype`, or `scale_dtype` where that is None.
          dtype: dtype that x is cast to, and of the result; None leaves x as it is.
          backend: None, "triton" or "xla", see `quant_matmul`.
          kernel_metadata: metadata of `packed`, `scale` and `zero_point`, for instance sharding
            names.
          rngs: not used; accepted so that the layer can replace another one.

        Raises:
          SpecError, BackendError: if the values are impossible.
        """
        del rngs
        self.options = make_expert_options(
            top_k=top_k,
            scoring=scoring,
            renormalize=renormalize,
            groups=groups,
            top_groups=top_groups,
            group_score=group_score,
            scaling_factor=scaling_factor,
            activation=activation,
            gated=gated,
            interleaved=interleaved,
            weigh=weigh,
            dtype=dtype,
            backend=backend,
        )
        check_expert_options(spec13, spec2, experts, self.options, scale_dtype, bias_dtype)
        self.spec13, self.spec2, self.experts, self.dtype = spec13, spec2, experts, dtype
        bias_dtype = choose_bias_dtype(use_bias, bias_dtype, dtype, scale_dtype)
        metadata = dict(kernel_metadata or {})
        self.w13, self.w2 = (
            ExpertStack(make_abstract(spec, scale_dtype, bias_dtype, experts=experts), metadata)
            for spec in (spec13, spec2)
        )

    @classmethod
    def from_weights(
        cls,
        w13: Mapping[str, jax.Array],
        w2: Mapping[str, jax.Array],
        spec13: QuantSpec,
        spec2: QuantSpec,
        **options,
    ) -> QuantMoE:
        """Make the layer that holds stacks of experts; both may have a "bias".

        Raises:
          SpecError: if the arrays contradict the specs.
        """
        experts = check_stacks((w13, w2), (spec13, spec2))
        options |= {"experts": experts, "use_bias": "bias" in w13}
        layer = nnx.eval_shape(lambda: cls(spec13, spec2, **options))
        for stack, weights in ((layer.w13, w13), (layer.w2, w2)):
            for name, array in weights.items():
                getattr(stack, name).set_value(jnp.asarray(array))
        return layer

    def __call__(
        self,
        x: jax.Array,
        router_logits: jax.Array,
        *,
        correction_bias: jax.Array | None = None,
        shared: jax.Array | None = None,
        shared_gate: jax.Array | None = None,
        expert_offset: jax.Array | int = 0,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Map x [..., H] to [..., H], constrained to `out_sharding` where that is given.

        Args:
          x: [..., H].
          router_logits: [..., number of all experts].
          correction_bias: of the choice, see `route`.
          shared: [..., H], the result of shared experts; it is added.
          shared_gate: logits [..., 1]; their sigmoid multiplies `shared`.
          expert_offset: id of this layer's first expert, if it holds only a part of them.

        Raises:
          SpecError, BackendError, TableError: as `route` and `quant_moe`.
        """
        return run_experts(
            x,
            router_logits,
            (self.w13.weights, self.w2.weights),
            (self.spec13, self.spec2),
            self.options,
            correction_bias=correction_bias,
            shared=shared,
            shared_gate=shared_gate,
            expert_offset=expert_offset,
            out_sharding=out_sharding,
        )


def check_expert_options(
    spec13: QuantSpec,
    spec2: QuantSpec,
    experts: int,
    options: ExpertOptions,
    scale_dtype: Any,
    bias_dtype: Any,
) -> None:
    """Raise a SpecError or BackendError if these are impossible; dtypes as `check_options`."""
    dtypes = options.dtype, scale_dtype, bias_dtype
    for name, spec in (("spec13", spec13), ("spec2", spec2)):
        if not isinstance(spec, QuantSpec):
            raise SpecError(f"{name} must be a QuantSpec, got {type(spec).__name__}")
        check_options(spec, options.backend, "speed", *dtypes)
    check_activation(options.activation, options.gated)
    if options.weigh not in _WEIGH:
        raise SpecError(f"weigh must be one of {_WEIGH}, got {options.weigh!r}")
    if options.interleaved and not options.gated:
        raise SpecError("interleaved is for gated experts")
    if type(experts) is not int or experts < 1:
        raise SpecError(f"experts must be an integer of at least 1, got {experts!r}")
    wanted = spec2.in_features * (2 if options.gated else 1), spec2.out_features
    if (spec13.out_features, spec13.in_features) != wanted:
        raise SpecError(
            f"spec13 must have [N, K] = {list(wanted)} to fit spec2, "
            f"got {[spec13.out_features, spec13.in_features]}"
        )


def check_stacks(
    stacks: tuple[Mapping[str, jax.Array], Mapping[str, jax.Array]],
    specs: tuple[QuantSpec, QuantSpec],
) -> int:
    """Count the experts; raise a SpecError unless w13 and w2 are stacks of equally many."""
    packed = stacks[0].get("packed") if isinstance(stacks[0], Mapping) else None
    experts = (*getattr(packed, "shape", ()), 0)[0]
    for name, weights, spec in zip(("w13", "w2"), stacks, specs, strict=True):
        try:
            check_weights(weights, spec, experts)
        except SpecError as error:
            raise SpecError(f"{name}: {error}") from error
        if "perm" in weights:
            raise SpecError(f"{name}: experts with reordered features (perm) are not supported")
    if ("bias" in stacks[0]) != ("bias" in stacks[1]):
        raise SpecError("w13 and w2 must both have a bias, or neither")
    return experts


def run_experts(
    x: jax.Array,
    router_logits: jax.Array,
    weights: tuple[Mapping[str, jax.Array], Mapping[str, jax.Array]],
    specs: tuple[QuantSpec, QuantSpec],
    options: ExpertOptions,
    *,
    correction_bias: jax.Array | None,
    shared: jax.Array | None,
    shared_gate: jax.Array | None,
    expert_offset: jax.Array | int,
    out_sharding: Any,
) -> jax.Array:
    """Route, run the chosen experts, add the shared ones; arguments as `QuantMoE.__call__`."""
    x = cast_input(x, options.dtype)
    router_logits = convert_array("router_logits", router_logits)
    held, lead = weights[0]["packed"].shape[0], x.shape[:-1]
    found = router_logits.shape
    if len(found) != x.ndim or found[:-1] != lead or found[-1] < held:
        raise SpecError(
            f"router_logits must be {[*lead, 'E']}, with E of at least the {held} experts of this "
            f"layer, got {list(found)}"
        )
    routing = dataclasses.asdict(options.routing)
    ids, factors = route(
        router_logits, correction_bias=correction_bias, backend=options.backend, **routing
    )
    y = quant_moe(
        x,
        ids,
        factors,
        *weights,
        *specs,
        activation=options.activation,
        gated=options.gated,
        interleaved=options.interleaved,
        weigh=options.weigh,
        expert_offset=expert_offset,
        shared=weigh_shared(shared, shared_gate),
        backend=options.backend,
    )
    return constrain(y, out_sharding)


def weigh_shared(shared: jax.Array | None, gate: jax.Array | None) -> jax.Array | None:
    """`shared` times the sigmoid of its gate's logits, float32; unchanged without a gate."""
    if shared is None or gate is None:
        if gate is not None:
            raise SpecError("shared_gate is given without shared")
        return shared
    shared, gate = convert_array("shared", shared), convert_array("shared_gate", gate)
    if gate.shape != (*shared.shape[:-1], 1):
        raise SpecError(f"shared_gate must be {[*shared.shape[:-1], 1]}, got {list(gate.shape)}")
    return weigh(shared, gate)
