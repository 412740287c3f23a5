"""`ModelConfig`: what `config.json` says about a language model, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxwna16.errors import ModelError
from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.config.language_config import (
    MAX_LAYERS,
    LanguageConfig,
    read_eos,
    read_saved_dtype,
    refuse_others,
)
from jaxwna16.models.config.moe_config import MOE_TYPES, read_moe
from jaxwna16.models.config.rope_config import read_rope, read_rotary_dim
from jaxwna16.models.config.windows import read_windows

Rule = bool | tuple[str, bool]
"""A fact of a family, or the key of `config.json` that states it and its default."""
_ATTENTION_BIAS = ("attention_bias", False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """How a model type differs from the others, apart from windows and experts.

    Numbers are what transformers' configuration class has where the key is absent; a head_dim of
    None is hidden_size / num_attention_heads.
    """

    qkv_bias: Rule = False
    out_bias: Rule = False
    mlp_bias: Rule = False
    qk_norm: Rule = False
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    has_prediction_layers: bool = False


_FAMILIES = {
    "llama": _Family(
        qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, mlp_bias=("mlp_bias", False)
    ),
    "mistral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(
        qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, qk_norm=True, head_dim=128
    ),
    "mixtral": _Family(rms_norm_eps=1e-5, rope_theta=1e6),
    "qwen2_moe": _Family(qkv_bias=("qkv_bias", True)),
    "qwen3_moe": _Family(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, qk_norm=True),
    "dots1": _Family(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, qk_norm=True),
    "glm4_moe": _Family(
        qkv_bias=_ATTENTION_BIAS,
        qk_norm=("use_qk_norm", False),
        rms_norm_eps=1e-5,
        partial_rotary_factor=0.5,
        has_prediction_layers=True,
    ),
}
MODEL_TYPES = tuple(_FAMILIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(LanguageConfig):
    """Everything the one definition in `jaxwna16.models.llama.definition` needs to know; hashable.

    Attributes:
      qkv_bias, out_bias, mlp_bias: which linears have a bias.
      qk_norm: whether queries and keys are normalised per head (Qwen3).
      windows: per layer, how many tokens a query sees (itself included), or None for all before it.
    """

    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json`, in the spelling of transformers 5 or an older one.

        Absent keys take the defaults of transformers' configuration classes for that model type,
        but for sizes and end tokens, whose defaults are those of one model: sizes must be stated.

        Raises:
          ModelError: listing every key that is missing, malformed or asks for the unsupported.
        """
        reader = ConfigReader(config)
        model_type = reader.choose("model_type", None, MODEL_TYPES)
        if model_type is None:
            raise ModelError("this model is not supported", reader.reasons)
        family = _FAMILIES[model_type]
        refuse_others(reader)
        if not config.get("is_causal", True):
            reader.refuse("is_causal", False, "only causal attention")
        noted = len(reader.reasons)
        hidden = reader.count("hidden_size")
        heads = reader.count("num_attention_heads")
        layers = reader.count("num_hidden_layers", most=MAX_LAYERS)
        kv_default = heads if model_type == "llama" or "num_key_value_heads" in config else None
        kv_heads = reader.count("num_key_value_heads", kv_default)
        head_dim = reader.count("head_dim", family.head_dim or max(hidden // heads, 1))
        max_positions = reader.count("max_position_embeddings")
        if len(reader.reasons) == noted:  # else one of these is not what the file says
            if config.get("head_dim") is None and family.head_dim is None and hidden % heads:
                expected = f"a multiple of num_attention_heads = {heads}"
                reader.refuse("hidden_size", hidden, expected)
            if heads % kv_heads:
                reader.refuse("num_attention_heads", heads, f"a multiple of kv heads = {kv_heads}")
            if head_dim % 2:
                reader.refuse("head_dim", head_dim, "an even number")
        parsed = cls(
            model_type=model_type,
            vocab_size=reader.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=reader.count("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=read_rotary_dim(reader, head_dim, family.partial_rotary_factor),
            max_position_embeddings=max_positions,
            rms_norm_eps=reader.number("rms_norm_eps", family.rms_norm_eps),
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            qkv_bias=_decide(reader, family.qkv_bias),
            out_bias=_decide(reader, family.out_bias),
            mlp_bias=_decide(reader, family.mlp_bias),
            qk_norm=_decide(reader, family.qk_norm),
            windows=read_windows(reader, model_type, layers),
            rope=read_rope(reader, max_positions, family.rope_theta),
            dtype=read_saved_dtype(reader),
            eos_token_ids=read_eos(reader),
            moe=read_moe(reader, model_type, layers) if model_type in MOE_TYPES else None,
            prediction_layers=reader.count(
                "num_nextn_predict_layers",
                int(family.has_prediction_layers),
                least=0,
                most=MAX_LAYERS,  # each is a branch of a pattern
            ),
        )
        if reader.reasons:
            raise ModelError(f"this {model_type} configuration is not supported", reader.reasons)
        return parsed


def _decide(reader: ConfigReader, rule: Rule) -> bool:
    return rule if isinstance(rule, bool) else reader.flag(*rule)
