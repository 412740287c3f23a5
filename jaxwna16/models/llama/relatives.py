"""The relatives of Llama: one definition, and a row for each `model_type`.

What a row does not state, its models do not have. docs/models.md shows how one is added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxwna16.models.config.fused import Fused, fuse_gate_and_up, fuse_heads
from jaxwna16.models.config.language_config import LanguageConfig
from jaxwna16.models.config.moe_config import (
    DeepseekExperts,
    ErnieExperts,
    ExpertRule,
    HunyuanExperts,
    SigmoidExperts,
    SoftmaxExperts,
)
from jaxwna16.models.config.rope_config import MROPE, PLAIN, RopeRule
from jaxwna16.models.config.windows import (
    UNREAD,
    WindowRule,
    Windows,
    slide_every_other_until,
    slide_from,
)

Rule = bool | tuple[str, bool]
"""A fact of a family, or the key of `config.json` that states it and its default."""
_ATTENTION_BIAS = ("attention_bias", False)
_USE_BIAS = ("use_bias", False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relative:
    """How a model type differs from the others.

    Numbers are what transformers' configuration class has where the key is absent.

    Attributes:
      qkv_bias, out_bias, mlp_bias: which linears have a bias.
      qk_norm: whether queries and keys are normalised.
      norms_across: whether all heads together are, not each.
      norms_last: whether each is after it is rotated, not before.
      paired: whether neighbouring features of a head are rotated together, not halves.
      wide_rope: whether cosines and sines are float32 in every model.
      states_kv_heads: whether `num_key_value_heads` must be there; otherwise there are as many as
        `num_attention_heads` where it is absent. Where it is null, there always are.
      head_dim: None is hidden_size / num_attention_heads.
      tied: whether the head is the embedding.
      has_unrotated: whether some layers have no rope, see `read_rotated`.
      rotary_key: what says how many features of a head are rotated, if `partial_rotary_factor`
        does not.
      rope: how it states rope, where not as the others.
      windows: how config.json states sliding windows, see `read_windows`.
      experts: how it states experts, see `read_moe`.
      has_prediction_layers: whether one layer past the last predicts tokens, if config.json is
        silent.
      has_multipliers: whether config.json states multipliers, see `read_multipliers`.
      prediction_key: what says how many do.
      fused: what files have as one module and the definition as several, of the configuration.
      required: keys of config.json, and the one value of each that the definition serves.
      is_part: whether such a model only stands inside of a whole (`jaxwna16.models.wrapped`).
    """

    qkv_bias: Rule = False
    out_bias: Rule = False
    mlp_bias: Rule = False
    qk_norm: Rule = False
    norms_across: bool = False
    norms_last: bool = False
    paired: bool = False
    wide_rope: bool = False
    states_kv_heads: bool = True
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    tied: bool = False
    has_unrotated: bool = False
    rotary_key: str | None = None
    rope: RopeRule = PLAIN
    windows: Windows = None
    experts: ExpertRule | None = None
    has_prediction_layers: bool = False
    prediction_key: str = "num_nextn_predict_layers"
    has_multipliers: bool = False
    fused: tuple[Callable[[LanguageConfig], Fused], ...] = ()
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_part: bool = False


_GLM4_EXPERTS = DeepseekExperts(
    experts=128, top_k=8, inner=1408, shared=1, first=1, renormalize=True
)
_QWEN2_VL = Relative(
    qkv_bias=True,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    rope=RopeRule(unread=("mrope_section",), aliases=("mrope",)),
    windows=WindowRule(size=4096, has_switch=True, slides=slide_from, max_window_layers=80),
    is_part=True,
)
_ERNIE = Relative(paired=True, wide_rope=True, rms_norm_eps=1e-5, rope_theta=5e5, tied=True)
_HUNYUAN = Relative(
    qkv_bias=_ATTENTION_BIAS,
    out_bias=_ATTENTION_BIAS,
    qk_norm=True,
    norms_last=True,
    rope=RopeRule(stretches=True),
    states_kv_heads=False,
    rms_norm_eps=1e-5,
    # what its files state, and transformers' class does not have
    required={"use_cla": False, "use_qk_norm": True},
)
_GRANITE = Relative(
    qkv_bias=_ATTENTION_BIAS,
    out_bias=_ATTENTION_BIAS,
    states_kv_heads=False,
    windows=UNREAD,
    has_multipliers=True,
)
_MIXTRAL_EXPERTS = SoftmaxExperts(
    experts=8, top_k=2, inner_key="intermediate_size", has_steps=False, renormalize=True
)
_QWEN3_VL = Relative(
    qkv_bias=_ATTENTION_BIAS,
    out_bias=_ATTENTION_BIAS,
    qk_norm=True,
    rope_theta=500000.0,
    rope=RopeRule(unread=MROPE),
    windows=UNREAD,
    is_part=True,
)
RELATIVES = {
    "llama": Relative(
        qkv_bias=_ATTENTION_BIAS,
        out_bias=_ATTENTION_BIAS,
        mlp_bias=("mlp_bias", False),
        states_kv_heads=False,
        windows=UNREAD,
    ),
    "mistral": Relative(windows=WindowRule(size=4096)),
    "qwen2": Relative(
        qkv_bias=True,
        windows=WindowRule(size=4096, has_switch=True, slides=slide_from, max_window_layers=28),
    ),
    "qwen3": Relative(
        qkv_bias=_ATTENTION_BIAS,
        out_bias=_ATTENTION_BIAS,
        qk_norm=True,
        head_dim=128,
        windows=WindowRule(size=4096, has_switch=True, slides=slide_from, max_window_layers=28),
    ),
    "smollm3": Relative(
        qkv_bias=_ATTENTION_BIAS,
        out_bias=_ATTENTION_BIAS,
        mlp_bias=("mlp_bias", False),
        rope_theta=2e6,
        tied=True,
        has_unrotated=True,
        windows=WindowRule(size=None, has_switch=True, slides="unrotated"),
    ),
    "seed_oss": Relative(
        qkv_bias=("attention_bias", True),
        out_bias=("attention_out_bias", False),
        mlp_bias=("mlp_bias", False),
        head_dim=128,
    ),
    "ernie4_5": dataclasses.replace(
        _ERNIE,
        qkv_bias=_USE_BIAS,
        out_bias=_USE_BIAS,
        mlp_bias=_USE_BIAS,
        head_dim=128,
    ),
    "hunyuan_v1_dense": _HUNYUAN,
    "phi3": Relative(
        states_kv_heads=False,
        rms_norm_eps=1e-5,
        windows=WindowRule(size=None),
        rope=RopeRule(longrope=4096),
        fused=(fuse_heads, fuse_gate_and_up),
    ),
    "mixtral": Relative(
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        windows=WindowRule(size=None),
        experts=_MIXTRAL_EXPERTS,
    ),
    "qwen2_moe": Relative(
        qkv_bias=("qkv_bias", True),
        windows=WindowRule(
            size=4096, has_switch=True, slides=slide_every_other_until, max_window_layers=28
        ),
        experts=SoftmaxExperts(experts=60, top_k=4, inner=1408, shared=5632),
    ),
    "qwen3_moe": Relative(
        qkv_bias=_ATTENTION_BIAS,
        out_bias=_ATTENTION_BIAS,
        qk_norm=True,
        windows=WindowRule(size=4096, has_switch=True),
        experts=SoftmaxExperts(experts=128, top_k=8, inner=768),
    ),
    "olmoe": Relative(
        qkv_bias=_ATTENTION_BIAS,
        out_bias=_ATTENTION_BIAS,
        qk_norm=True,
        norms_across=True,
        states_kv_heads=False,
        rms_norm_eps=1e-5,
        experts=SoftmaxExperts(experts=64, top_k=8, inner_key="intermediate_size", has_steps=False),
        required={"clip_qkv": None},
    ),
    "dots1": Relative(
        qkv_bias=_ATTENTION_BIAS,
        out_bias=_ATTENTION_BIAS,
        qk_norm=True,
        windows=WindowRule(size=4096, slides=slide_from, max_window_layers=62),
        experts=DeepseekExperts(inner=1408),
    ),
    "ernie4_5_moe": dataclasses.replace(
        _ERNIE,
        experts=ErnieExperts(experts=64, top_k=6, inner=1536, shared=2, first=1),
        required={"use_bias": False},  # the head would have one, too, and experts none
    ),
    "hunyuan_v1_moe": dataclasses.replace(
        _HUNYUAN,
        experts=HunyuanExperts(experts=1, top_k=1),
        required={
            **_HUNYUAN.required,
            "moe_layer_num_skipped": 0,
            "norm_topk_prob": True,
            "num_shared_expert": 1,
            "use_mixed_mlp_moe": True,
        },
    ),
    "glm4_moe": Relative(
        qkv_bias=_ATTENTION_BIAS,
        qk_norm=("use_qk_norm", False),
        rms_norm_eps=1e-5,
        partial_rotary_factor=0.5,
        windows=UNREAD,
        experts=_GLM4_EXPERTS,
        has_prediction_layers=True,
    ),
    "granite": dataclasses.replace(_GRANITE, mlp_bias=("mlp_bias", False)),
    "minimax_m2": Relative(
        qk_norm=True,
        norms_across=True,
        head_dim=128,
        rope_theta=5e6,
        rotary_key="rotary_dim",
        experts=SigmoidExperts(experts=256, top_k=8, inner_key="intermediate_size"),
        prediction_key="num_mtp_modules",
        required={
            "attn_type_list": 1,  # attention; 0 was lightning attention in MiniMax-01
            "qk_norm_type": "per_layer",
            "shared_intermediate_size": 0,
            "use_qk_norm": True,
            "use_routing_bias": True,
        },
    ),
    "granitemoe": dataclasses.replace(_GRANITE, experts=_MIXTRAL_EXPERTS),
    "ministral3": Relative(
        rms_norm_eps=1e-5,
        head_dim=128,
        rope=RopeRule(
            unread=("max_position_embeddings",),
            absent={
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            scales_queries=True,
        ),
        windows=WindowRule(size=None),
    ),
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3_vl_text": dataclasses.replace(_QWEN3_VL, head_dim=128),
    "qwen3_vl_moe_text": dataclasses.replace(
        _QWEN3_VL,
        experts=SoftmaxExperts(experts=60, top_k=4, inner=1408, renormalize=True),
    ),
    "qwen2_5_omni_text": Relative(
        qkv_bias=True,
        rope_theta=1e6,
        rope=RopeRule(unread=("mrope_section",)),
        windows=WindowRule(size=32768, has_switch=True, slides=slide_from, max_window_layers=28),
        is_part=True,
    ),
    "qwen3_omni_moe_text": Relative(
        qkv_bias=_ATTENTION_BIAS,
        out_bias=_ATTENTION_BIAS,
        qk_norm=True,
        rope_theta=1e6,
        rope=RopeRule(unread=(*MROPE, "interleaved")),
        windows=UNREAD,
        experts=SoftmaxExperts(experts=128, top_k=8, inner=768, norm_topk_prob=True),
        is_part=True,
    ),
    "glm4v_moe_text": Relative(
        qkv_bias=("attention_bias", True),
        rms_norm_eps=1e-5,
        partial_rotary_factor=0.5,
        rope=RopeRule(unread=("mrope_section",)),
        windows=UNREAD,
        experts=_GLM4_EXPERTS,
        has_prediction_layers=True,
        required={"use_qk_norm": False},
        is_part=True,
    ),
}
"""`model_type` -> its row."""
PARTS = frozenset(name for name, row in RELATIVES.items() if row.is_part)
"""Those that only stand inside of a whole."""
