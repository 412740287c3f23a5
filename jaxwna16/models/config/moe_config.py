"""`MoeConfig`: what `config.json` says about experts and how they are chosen, checked."""

from __future__ import annotations

import dataclasses

from jaxwna16.models.config.config_reader import ConfigReader
from pallas_kernels.routing import Routing

_INNER, _TOP_K = "moe_intermediate_size", "num_experts_per_tok"
_DEEPSEEK = ("dots1", "glm4_moe")
_DEFAULTS: dict[str, tuple[int | None, int | None, int | None]] = {
    "mixtral": (8, 2, None),
    "qwen2_moe": (60, 4, 1408),
    "qwen3_moe": (128, 8, 768),
    "dots1": (None, None, 1408),
    "glm4_moe": (128, 8, 1408),
}
"""Experts, experts of a token, features of one expert, where config.json is silent."""
MOE_TYPES = tuple(_DEFAULTS)


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
      correction_bias: whether the router has a bias that counts for the choice only.
      routing: how experts are chosen, see `route`.
    """

    sparse: tuple[bool, ...]
    experts: int
    intermediate_size: int
    shared: str | None
    shared_intermediate_size: int
    shared_gate: bool
    wide_router: bool
    correction_bias: bool
    routing: Routing


def read_moe(reader: ConfigReader, model_type: str, layers: int) -> MoeConfig:
    """Read the part of a `config.json` of one of `MOE_TYPES` that is about experts.

    Absent keys take the defaults of transformers' configuration classes.
    """
    read = _read_deepseek if model_type in _DEEPSEEK else _read_softmax
    faults = len(reader.reasons)
    moe = read(reader, model_type, layers)
    if len(reader.reasons) == faults:
        check_choice(reader, moe.experts, moe.routing)
    return moe


def check_choice(reader: ConfigReader, experts: int, routing: Routing) -> None:
    """Refuse groups that do not divide the experts, and more choices than there are experts."""
    groups, size = routing.groups, experts // routing.groups
    if experts % groups:
        reader.refuse("n_group", groups, f"a divisor of the {experts} experts")
    elif groups > 1 and size < 2:
        reader.refuse("n_group", groups, "groups of at least 2 experts")
    elif routing.top_k > size * routing.top_groups:
        expected = f"at most {size * routing.top_groups}, the experts to choose from"
        reader.refuse(_TOP_K, routing.top_k, expected)


def _read_softmax(reader: ConfigReader, model_type: str, layers: int) -> MoeConfig:
    """Mixtral, Qwen2-MoE and Qwen3-MoE: softmax over all experts."""
    reader.choose("scoring_func", "softmax", ("softmax",))
    reader.choose("topk_method", "greedy", ("greedy",))
    mixtral, shared = model_type == "mixtral", model_type == "qwen2_moe"
    experts, top_k, inner = _DEFAULTS[model_type]
    return MoeConfig(
        sparse=(True,) * layers if mixtral else _read_sparse_steps(reader, layers),
        experts=reader.count_either(("num_local_experts", "num_experts"), experts),
        intermediate_size=reader.count("intermediate_size" if mixtral else _INNER, inner),
        shared="shared_expert" if shared else None,
        shared_intermediate_size=(
            reader.count("shared_expert_intermediate_size", 5632) if shared else 0
        ),
        shared_gate=shared,
        wide_router=False,
        correction_bias=False,
        routing=Routing(
            top_k=reader.count(_TOP_K, top_k),
            renormalize=mixtral or reader.flag("norm_topk_prob"),
        ),
    )


def _read_deepseek(reader: ConfigReader, model_type: str, layers: int) -> MoeConfig:
    """dots.llm1 and GLM-4-MoE: the routing of DeepSeek-V3 (https://arxiv.org/abs/2412.19437)."""
    # dots.llm1 writes the name of the method here
    reader.choose("scoring_func", "sigmoid", ("sigmoid", "noaux_tc"))
    reader.choose("topk_method", "noaux_tc", ("noaux_tc",))
    if reader.count("moe_layer_freq", 1) != 1:
        reader.refuse("moe_layer_freq", reader.config["moe_layer_freq"], "1")
    glm = model_type == "glm4_moe"
    experts, top_k, inner = _DEFAULTS[model_type]
    inner = reader.count(_INNER, inner)
    first = reader.count("first_k_dense_replace", 1 if glm else 0, least=0)
    groups, top_groups = reader.count("n_group", 1), reader.count("topk_group", 1)
    if top_groups > groups:
        reader.refuse("topk_group", top_groups, f"at most n_group = {groups}")
    return MoeConfig(
        sparse=tuple(i >= first for i in range(layers)),
        experts=reader.count_either(("n_routed_experts", "num_local_experts"), experts),
        intermediate_size=inner,
        shared="shared_experts",
        shared_intermediate_size=inner * reader.count("n_shared_experts", 1 if glm else None),
        shared_gate=False,
        wide_router=True,
        correction_bias=True,
        routing=Routing(
            top_k=reader.count(_TOP_K, top_k),
            scoring="sigmoid",
            renormalize=reader.flag("norm_topk_prob", glm),
            groups=groups,
            top_groups=min(groups, top_groups),
            group_score="top2_sum",
            scaling_factor=reader.number("routed_scaling_factor", 1.0),
        ),
    )


def _read_sparse_steps(reader: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer, but for those in `mlp_only_layers`."""
    step = reader.count("decoder_sparse_step", 1)
    dense = reader.config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        reader.refuse("mlp_only_layers", dense, "a list of layers")
        dense = []
    dense = set(dense)
    return tuple((i + 1) % step == 0 and i not in dense for i in range(layers))
