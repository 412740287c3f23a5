"""`MoeConfig`: what `config.json` says about experts and how they are chosen, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Protocol

from jaxwna16.models.config.config_reader import ConfigReader
from pallas_kernels.formulas.routing_options import Routing

_INNER, _TOP_K = "moe_intermediate_size", "num_experts_per_tok"
_MOST_LEAST_SUM = 1e-6
"""Sums of chosen scores below this are raised to it in some models, which nothing here does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The sparse layers of a model; hashable.

    Attributes:
      sparse: per layer, whether it has experts or one MLP.
      experts: E, in each sparse layer.
      intermediate_size: I of one expert.
      shared: name of the shared experts in the checkpoint ("shared_expert"), or None.
      shared_intermediate_size: I of all shared experts together.
      shared_gate: whether a sigmoid gate weighs them.
      wide_router: whether the router computes in float32; otherwise in the model's dtype.
      keeps_router: whether the router's weight is float32 whatever the model's dtype is.
      correction_bias: whether the router has a bias that counts for the choice only.
      bias_lead: axes of it in files, before that of the experts.
      routing: how experts are chosen, see `route`.
    """

    sparse: tuple[bool, ...]
    experts: int
    intermediate_size: int
    shared: str | None = None
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    wide_router: bool = False
    keeps_router: bool = False
    correction_bias: bool = False
    bias_lead: tuple[int, ...] = ()
    routing: Routing


class ExpertRule(Protocol):
    """How the `config.json` of a family with experts says what they are."""

    def read(self, reader: ConfigReader, layers: int) -> MoeConfig:
        """The part of a `config.json` that is about experts, if it is that of such a family."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxExperts:
    """Softmax over all experts: Mixtral, Qwen2-MoE, Qwen3-MoE.

    Numbers are what transformers' configuration class has where the key is absent; None is a key
    that must be stated.

    Attributes:
      experts, top_k: how many there are, and how many of them a token has.
      inner_key, inner: which key states the features of one expert.
      has_steps: whether `decoder_sparse_step` and `mlp_only_layers` choose the sparse layers, and
        not all are.
      renormalize: whether the weights of a token always add up to 1; otherwise `norm_topk_prob`
        says so.
      norm_topk_prob: of the key of that name.
      shared: features of a shared expert, which has a gate; None if there is none.
    """

    experts: int
    top_k: int
    inner_key: str = _INNER
    inner: int | None = None
    has_steps: bool = True
    renormalize: bool = False
    norm_topk_prob: bool = False
    shared: int | None = None

    def read(self, reader: ConfigReader, layers: int) -> MoeConfig:
        scoring = _read_scoring(reader, {"softmax": "softmax"})
        reader.choose("topk_method", "greedy", ("greedy",))
        is_shared = self.shared is not None
        return MoeConfig(
            sparse=_read_sparse_steps(reader, layers) if self.has_steps else (True,) * layers,
            experts=reader.count_either(("num_local_experts", "num_experts"), self.experts),
            intermediate_size=reader.count(self.inner_key, self.inner),
            shared="shared_expert" if is_shared else None,
            shared_intermediate_size=(
                reader.count("shared_expert_intermediate_size", self.shared) if is_shared else 0
            ),
            shared_gate=is_shared,
            routing=Routing(
                top_k=reader.count(_TOP_K, self.top_k),
                scoring=scoring,
                renormalize=self.renormalize or reader.flag("norm_topk_prob", self.norm_topk_prob),
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmoidExperts:
    """Sigmoid scores, chosen with a correction bias among all experts: MiniMax-M2.

    The weights of a token add up to 1.

    Attributes:
      experts, top_k, inner_key, inner: as in `SoftmaxExperts`.
    """

    experts: int
    top_k: int
    inner_key: str = _INNER
    inner: int | None = None

    def read(self, reader: ConfigReader, layers: int) -> MoeConfig:
        return MoeConfig(
            sparse=(True,) * layers,
            experts=reader.count_either(("num_local_experts", "num_experts"), self.experts),
            intermediate_size=reader.count(self.inner_key, self.inner),
            correction_bias=True,
            routing=Routing(
                top_k=reader.count(_TOP_K, self.top_k),
                scoring=_read_scoring(reader, {"sigmoid": "sigmoid"}),
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErnieExperts:
    """Softmax over all experts, chosen with a correction bias: ERNIE 4.5.

    The weights of a token add up to 1. Numbers are what transformers' configuration class has where
    the key is absent.

    Attributes:
      experts, top_k, inner: as in `SoftmaxExperts`.
      shared: how many experts serve every token, as one MLP.
      first: the first sparse layer.
    """

    experts: int
    top_k: int
    inner: int
    shared: int
    first: int
    top_k_key: ClassVar[str] = "moe_k"

    def read(self, reader: ConfigReader, layers: int) -> MoeConfig:
        inner = reader.count(_INNER, self.inner)
        shared = reader.count("moe_num_shared_experts", self.shared, least=0)
        if reader.number("moe_norm_min", 1e-12) > _MOST_LEAST_SUM:
            expected = f"at most {_MOST_LEAST_SUM:g}, which no sum of scores reaches"
            reader.refuse("moe_norm_min", reader.config["moe_norm_min"], expected)
        return MoeConfig(
            sparse=self._read_sparse(reader, layers),
            experts=reader.count_either(("moe_num_experts", "num_experts"), self.experts),
            intermediate_size=inner,
            shared="shared_experts" if shared else None,
            shared_intermediate_size=shared * inner,
            wide_router=True,
            keeps_router=True,
            correction_bias=True,
            bias_lead=(1,),
            routing=Routing(top_k=reader.count_either((self.top_k_key, _TOP_K), self.top_k)),
        )

    def _read_sparse(self, reader: ConfigReader, layers: int) -> tuple[bool, ...]:
        """Every `moe_layer_interval`-th layer of those from a first to a last."""
        step = reader.count("moe_layer_interval", 1)
        first = reader.count("moe_layer_start_index", self.first, least=0)
        last = reader.count("moe_layer_end_index", -1, least=-1)
        last = layers - 1 if last == -1 else last
        return tuple((i + 1) % step == 0 and first <= i <= last for i in range(layers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HunyuanExperts:
    """Softmax over all experts, whose weights add up to 1, and a shared one: Hunyuan-A13B.

    Attributes:
      experts, top_k: as in `SoftmaxExperts`. Files may state a number for each layer.
    """

    experts: int
    top_k: int
    top_k_key: ClassVar[str] = "moe_topk"

    def read(self, reader: ConfigReader, layers: int) -> MoeConfig:
        inner = reader.count("intermediate_size")
        reader.require(_INNER, inner)
        return MoeConfig(
            sparse=(True,) * layers,
            experts=reader.count_alike("num_experts", self.experts),
            intermediate_size=inner,
            shared="shared_mlp",
            shared_intermediate_size=inner,
            routing=Routing(top_k=reader.count_alike(self.top_k_key, self.top_k)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekExperts:
    """The routing of DeepSeek-V3 (https://arxiv.org/abs/2412.19437): dots.llm1 and GLM-4-MoE.

    Numbers are what transformers' configuration class has where the key is absent; None is a key
    that must be stated.

    Attributes:
      experts, top_k, inner: as in `SoftmaxExperts`.
      shared: how many experts serve every token, as one MLP.
      first: how many layers are dense before the sparse ones.
      renormalize: of `norm_topk_prob`.
      groups, top_groups, scaling: of `n_group`, `topk_group` and `routed_scaling_factor`.
      has_types: whether `mlp_layer_types` may say of each layer which it is.
    """

    experts: int | None = None
    top_k: int | None = None
    inner: int
    shared: int | None = None
    first: int = 0
    renormalize: bool = False
    groups: int = 1
    top_groups: int = 1
    scaling: float = 1.0
    has_types: bool = False

    def read(self, reader: ConfigReader, layers: int) -> MoeConfig:
        reader.choose("topk_method", "noaux_tc", ("noaux_tc",))
        reader.require("moe_layer_freq", 1)
        inner = reader.count(_INNER, self.inner)
        sparse = _read_sparse_from(reader, layers, self.first)
        return MoeConfig(
            sparse=_read_sparse_types(reader, layers, sparse) if self.has_types else sparse,
            experts=reader.count_either(("n_routed_experts", "num_local_experts"), self.experts),
            intermediate_size=inner,
            shared="shared_experts",
            shared_intermediate_size=inner * reader.count("n_shared_experts", self.shared),
            shared_gate=False,
            wide_router=True,
            keeps_router=True,
            correction_bias=True,
            routing=self._read_routing(reader),
        )

    def _read_routing(self, reader: ConfigReader) -> Routing:
        groups, top_groups = _read_groups(reader, self.groups, self.top_groups)
        return Routing(
            top_k=reader.count(_TOP_K, self.top_k),
            # dots.llm1 writes the name of the method here
            scoring=_read_scoring(reader, {"sigmoid": "sigmoid", "noaux_tc": "sigmoid"}),
            renormalize=reader.flag("norm_topk_prob", self.renormalize),
            groups=groups,
            top_groups=top_groups,
            group_score="top2_sum",
            scaling_factor=reader.number("routed_scaling_factor", self.scaling),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV2Experts:
    """Softmax over all experts, chosen among all or within the best groups: DeepSeek-V2.

    A group is as good as its best expert. The weights of a token are not made to add up to 1.

    Attributes:
      experts, inner, shared: as in `DeepseekExperts`.
    """

    experts: int
    inner: int
    shared: int

    def read(self, reader: ConfigReader, layers: int) -> MoeConfig:
        method = reader.choose("topk_method", "greedy", ("greedy", "group_limited_greedy"))
        reader.require("norm_topk_prob", False)
        reader.require("moe_layer_freq", 1)
        inner, groups, top_groups = reader.count(_INNER, self.inner), 1, 1
        if method == "group_limited_greedy":
            groups, top_groups = _read_groups(reader)
        return MoeConfig(
            sparse=_read_sparse_from(reader, layers, 0),
            experts=reader.count_either(("n_routed_experts", "num_experts"), self.experts),
            intermediate_size=inner,
            shared="shared_experts",
            shared_intermediate_size=inner * reader.count("n_shared_experts", self.shared),
            wide_router=True,
            keeps_router=True,
            routing=Routing(
                top_k=reader.count(_TOP_K),
                scoring=_read_scoring(reader, {"softmax": "softmax"}),
                renormalize=False,
                groups=groups,
                top_groups=top_groups,
                scaling_factor=reader.number("routed_scaling_factor", 1.0),
            ),
        )


def read_moe(reader: ConfigReader, rule: ExpertRule | None, layers: int) -> MoeConfig | None:
    """Read the part of a `config.json` that is about experts; None of a family without.

    Args:
      rule: of the family.
      layers: how many there are.
    """
    if rule is None:
        return None
    faults = len(reader.reasons)
    moe = rule.read(reader, layers)
    if len(reader.reasons) == faults:
        check_choice(reader, moe.experts, moe.routing, getattr(rule, "top_k_key", _TOP_K))
    return moe


def check_choice(
    reader: ConfigReader, experts: int, routing: Routing, top_k_key: str = _TOP_K
) -> None:
    """Refuse groups that do not divide the experts, and more choices than there are experts."""
    groups, size = routing.groups, experts // routing.groups
    if experts % groups:
        reader.refuse("n_group", groups, f"a divisor of the {experts} experts")
    elif groups > 1 and size < 2:
        reader.refuse("n_group", groups, "groups of at least 2 experts")
    elif routing.top_k > size * routing.top_groups:
        expected = f"at most {size * routing.top_groups}, the experts to choose from"
        reader.refuse(top_k_key, routing.top_k, expected)


def _read_scoring(reader: ConfigReader, names: Mapping[str, str]) -> str:
    """`scoring_func` as `Routing` calls it.

    Args:
      names: in files -> a name of `SCORINGS`; the first is that of an absent key.
    """
    default = next(iter(names))
    return names[reader.choose("scoring_func", default, tuple(names)) or default]


def _read_groups(
    reader: ConfigReader, groups: int | None = None, top_groups: int | None = None
) -> tuple[int, int]:
    """Groups of experts, and in how many of them a token's are; None must be stated."""
    groups, top_groups = reader.count("n_group", groups), reader.count("topk_group", top_groups)
    if top_groups > groups:
        reader.refuse("topk_group", top_groups, f"at most n_group = {groups}")
    return groups, min(groups, top_groups)


def _read_sparse_from(reader: ConfigReader, layers: int, default: int) -> tuple[bool, ...]:
    """All but the first `first_k_dense_replace` layers."""
    first = reader.count("first_k_dense_replace", default, least=0)
    return tuple(i >= first for i in range(layers))


def _read_sparse_types(
    reader: ConfigReader, layers: int, default: tuple[bool, ...]
) -> tuple[bool, ...]:
    """What `mlp_layer_types` says of each layer."""
    types = reader.config.get("mlp_layer_types")
    if types is None:
        return default
    kinds = ("dense", "sparse")
    if not isinstance(types, list) or len(types) != layers or any(t not in kinds for t in types):
        reader.refuse("mlp_layer_types", types, f"{layers} entries, each dense or sparse")
        return default
    return tuple(kind == "sparse" for kind in types)


def _read_sparse_steps(reader: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer, but for those in `mlp_only_layers`."""
    step = reader.count("decoder_sparse_step", 1)
    dense = reader.config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        reader.refuse("mlp_only_layers", dense, "a list of layers")
        dense = []
    dense = set(dense)
    return tuple((i + 1) % step == 0 and i not in dense for i in range(layers))
