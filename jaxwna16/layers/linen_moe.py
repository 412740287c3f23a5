"""`QuantMoE` for Flax Linen, the twin of the NNX layer; users know it as `linen.QuantMoE`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxwna16.layers.dense import choose_bias_dtype, make_start
from jaxwna16.layers.moe import (
    EXPERT_OPTIONS,
    ExpertOptions,
    check_expert_options,
    make_expert_options,
    run_experts,
)
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import make_abstract


def declare_leaves(
    module: nn.Module, leaves: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The params of a module that hold a leaf dict."""
    # Linen checks only the shape of a given leaf, so a loaded scale keeps its dtype
    return {
        name: module.param(name, lambda _, name=name, leaf=leaf: make_start(name, leaf))
        for name, leaf in leaves.items()
    }


class ExpertStack(nn.Module):
    """The leaf dict of E experts' weights as params."""

    leaves: Any

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return declare_leaves(self, dict(self.leaves))


class QuantMoE(nn.Module):
    """y = sum of the chosen experts' act(x @ Wg.T) * (x @ Wu.T) @ Wd.T, weighed by a router.

    All leaves are in the collection "params" under "w13" and "w2" with the names of the leaf dict,
    so the tree of a checkpoint can be used directly. Attributes are the arguments of
    `jaxwna16.QuantMoE`; `scale_dtype` and `bias_dtype` are used by `init` alone.

    Raises:
      SpecError, BackendError: if the values are impossible.

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
      layer = jaxwna16.linen.QuantMoE(spec13, spec2, experts=4, top_k=2)
      x = jnp.ones((3, 64), jnp.bfloat16)
      y = layer.apply({"params": {"w13": w13, "w2": w2}}, x, jnp.zeros((3, 4)))
      assert y.shape == (3, 64)
      ```
    """

    spec13: QuantSpec
    spec2: QuantSpec
    experts: int
    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    scaling_factor: float = 1.0
    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    weigh: str = "output"
    use_bias: bool = False
    scale_dtype: Any = jnp.bfloat16
    bias_dtype: Any = None
    dtype: Any = None
    backend: str | None = None

    def __post_init__(self):
        dtypes = self.scale_dtype, self.bias_dtype
        check_expert_options(self.spec13, self.spec2, self.experts, self.options, *dtypes)
        super().__post_init__()

    @property
    def options(self) -> ExpertOptions:
        """What is computed, and how experts are chosen."""
        return make_expert_options(**{name: getattr(self, name) for name in EXPERT_OPTIONS})

    def setup(self):
        dtypes = self.bias_dtype, self.dtype, self.scale_dtype
        bias_dtype = choose_bias_dtype(self.use_bias, *dtypes)
        self.w13, self.w2 = (
            ExpertStack(make_abstract(spec, self.scale_dtype, bias_dtype, experts=self.experts))
            for spec in (self.spec13, self.spec2)
        )

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
        """Map x [..., H] to [..., H]; arguments and errors as `jaxwna16.QuantMoE.__call__`."""
        return run_experts(
            x,
            router_logits,
            (self.w13(), self.w2()),
            (self.spec13, self.spec2),
            self.options,
            correction_bias=correction_bias,
            shared=shared,
            shared_gate=shared_gate,
            expert_offset=expert_offset,
            out_sharding=out_sharding,
        )
