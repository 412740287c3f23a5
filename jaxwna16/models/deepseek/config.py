"""`DeepseekConfig`: what `config.json` says about a model with latent attention, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxwna16.models.config.config_reader import MAX_COUNT, ConfigReader, Section
from jaxwna16.models.config.fused import Fused
from jaxwna16.models.config.language_config import MAX_LAYERS, LanguageConfig
from jaxwna16.models.config.moe_config import (
    DeepseekExperts,
    DeepseekV2Experts,
    ExpertRule,
    read_moe,
)
from jaxwna16.models.config.rope_config import RopeConfig
from jaxwna16.models.config.stated import check_reasons, read_stated
from pallas_kernels.step.latent_attention import BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How a `model_type` differs from the others.

    Numbers are what transformers' configuration class has where the key is absent.

    Attributes:
      experts: how it states experts, see `read_moe`.
      q_lora_rank: of latents of queries; a null in config.json is none.
      nope, rotated, value: features of a head: those of its key that are not rotated, those that
        are, and those of its value.
      rms_norm_eps: of the key of that name.
      prediction_layers: how many stand past the last, if config.json is silent.
      states_pairs: whether `rope_interleave` is read; otherwise neighbours are rotated together.
      wide_rope: see `DeepseekConfig`.
      index_topk: how many tokens an indexer keeps for a query; None of models without one.
    """

    experts: ExpertRule
    q_lora_rank: int = 1536
    nope: int = 128
    rotated: int = 64
    value: int = 128
    rms_norm_eps: float = 1e-6
    prediction_layers: int = 0
    states_pairs: bool = True
    wide_rope: bool = False
    index_topk: int | None = None


_V3_EXPERTS = DeepseekExperts(
    experts=256,
    top_k=8,
    inner=2048,
    shared=1,
    first=3,
    renormalize=True,
    groups=8,
    top_groups=4,
    scaling=2.5,
)
_ONE_GROUP = {"groups": 1, "top_groups": 1, "has_types": True}
_V3 = Kind(experts=_V3_EXPERTS, prediction_layers=1)
KINDS = {
    "deepseek_v3": _V3,
    "kimi_k2": _V3,
    "deepseek_v2": Kind(
        experts=DeepseekV2Experts(experts=64, inner=1407, shared=2),
        states_pairs=False,
        wide_rope=True,
    ),
    "glm4_moe_lite": Kind(
        experts=dataclasses.replace(
            _V3_EXPERTS,
            **{"experts": 64, "top_k": 4, "inner": 1536, "first": 1, "scaling": 1.8},
            **_ONE_GROUP,
        ),
        q_lora_rank=768,
        nope=192,
        value=256,
        rms_norm_eps=1e-5,
        prediction_layers=1,
    ),
    "deepseek_v32": Kind(
        experts=dataclasses.replace(_V3_EXPERTS, has_types=True),
        states_pairs=False,
        prediction_layers=1,
        index_topk=2048,
    ),
    "glm_moe_dsa": Kind(
        experts=dataclasses.replace(_V3_EXPERTS, **_ONE_GROUP),
        q_lora_rank=2048,
        nope=192,
        value=256,
        rms_norm_eps=1e-5,
        states_pairs=False,
        prediction_layers=1,
        index_topk=2048,
    ),
}
"""`model_type` -> its row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekConfig(LanguageConfig):
    """Everything the definition in `jaxwna16.models.deepseek.definition` needs to know; hashable.

    `head_dim` is that of queries and keys, `rotary_dim` of its end, which is rotated.

    Attributes:
      q_lora_rank: of latents of queries; None where queries come from the stream.
      kv_lora_rank: R, of the latents that are kept.
      v_head_dim: features of a head's value.
      attention_bias: whether what makes the latents, and the output, have biases.
      paired: whether neighbouring features are rotated together, not halves.
      wide_rope: whether cosines and sines are float32 in every model.
      index_topk: of an indexer, which chooses so many tokens for each query. Up to that length it
        keeps all, so that attention to all tokens is exact; longer rows are refused.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    v_head_dim: int
    attention_bias: bool
    paired: bool
    wide_rope: bool
    index_topk: int | None

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together: also no more than an indexer keeps."""
        return min(super().max_length, self.index_topk or MAX_COUNT)

    @property
    def length_reason(self) -> str:
        if self.index_topk is None:
            return ""
        return (
            f"index_topk = {self.index_topk}: its indexer, which chooses so many tokens for each, "
            "is not run, and up to that length it keeps all"
        )

    @property
    def left_out(self) -> Mapping[str, str]:
        if self.index_topk is None:
            return {}
        rows = f"rows of more than index_topk = {self.index_topk} tokens"
        reason = f"an indexer: it chooses tokens in {rows}, and longer ones are refused"
        return {r"layers\.\d+\.self_attn\.indexer(\.|$)": reason}

    @property
    def qk_nope_head_dim(self) -> int:
        """Features of a head's key that are not rotated."""
        return self.head_dim - self.rotary_dim

    @property
    def score_scale(self) -> float:
        """Of the scores: 1 / sqrt(head_dim), times the square of yarn's `mscale_all_dim` scale."""
        return self.head_dim**-0.5 * _scale_all(self.rope) ** 2

    @property
    def widest_features(self) -> int:
        """As of other models, or those of attention: queries, and float32 scores of a block."""
        latents = (self.q_lora_rank or 0) + self.kv_lora_rank + self.rotary_dim
        each = self.head_dim + 2 * self.v_head_dim + 4 * BLOCK
        return max(super().widest_features, self.num_attention_heads * each + latents)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DeepseekConfig:
        """Read a `config.json`; absent keys take the defaults of transformers, but for sizes.

        Raises:
          ModelError: listing every key that is missing, malformed or asks for the unsupported.
        """
        reader = ConfigReader(config)
        kind = KINDS[reader.config["model_type"]]
        rotated = reader.count("qk_rope_head_dim", kind.rotated, least=2)
        if rotated % 2:
            reader.refuse("qk_rope_head_dim", rotated, "an even number")
            rotated += 1
        # transformers, too, takes it for `head_dim` whatever config.json says
        inner = ConfigReader(Section({**config, "head_dim": rotated}, reader.section))
        inner.reasons = reader.reasons
        stated = read_stated(
            inner, rms_norm_eps=kind.rms_norm_eps, rope_theta=1e4, states_kv_heads=False
        )
        heads = stated["num_attention_heads"]
        has_latents = "q_lora_rank" in reader.config or "q_lora_rank" not in reader.given
        layers = stated["num_hidden_layers"]
        reader.require("mlp_bias", False)
        if not kind.states_pairs:
            reader.require("rope_interleave", True)
        parsed = cls(
            **stated
            | {
                # each has a key and a value of its own, whatever `num_key_value_heads` says
                "num_key_value_heads": heads,
                "head_dim": reader.count("qk_nope_head_dim", kind.nope) + rotated,
            },
            q_lora_rank=reader.count("q_lora_rank", kind.q_lora_rank) if has_latents else None,
            kv_lora_rank=reader.count("kv_lora_rank", 512),
            v_head_dim=reader.count("v_head_dim", kind.value),
            attention_bias=reader.flag("attention_bias"),
            paired=reader.flag("rope_interleave", True) if kind.states_pairs else True,
            wide_rope=kind.wide_rope,
            index_topk=None
            if kind.index_topk is None
            else reader.count("index_topk", kind.index_topk),
            moe=read_moe(reader, kind.experts, layers),
            prediction_layers=reader.count(
                "num_nextn_predict_layers", kind.prediction_layers, least=0, most=MAX_LAYERS
            ),
        )
        check_reasons(reader)
        return parsed


def list_fused(config: DeepseekConfig) -> tuple[Fused, ...]:
    """W_k and W_v of each head are one module in the files."""
    segments = (("k_b_proj", config.qk_nope_head_dim), ("v_b_proj", config.v_head_dim))
    heads = config.num_attention_heads
    return (Fused(name="self_attn.kv_b_proj", segments=segments, blocks=heads),)


def _scale_all(rope: RopeConfig) -> float:
    """What yarn multiplies queries and keys by in DeepSeek's code, each."""
    if rope.rope_type != "yarn" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0
