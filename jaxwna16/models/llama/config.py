"""`LlamaConfig`: what `config.json` says about a language model, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxwna16.errors import ModelError
from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.config.language_config import MAX_LAYERS, LanguageConfig
from jaxwna16.models.config.moe_config import read_moe
from jaxwna16.models.config.rope_config import read_rotated
from jaxwna16.models.config.stated import check_reasons, read_multipliers, read_stated
from jaxwna16.models.config.windows import read_windows
from jaxwna16.models.llama.relatives import RELATIVES, Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(LanguageConfig):
    """Everything the one definition in `jaxwna16.models.llama.definition` needs to know; hashable.

    Attributes:
      qkv_bias, out_bias, mlp_bias: which linears have a bias.
      qk_norm: whether queries and keys are normalised.
      norms_across: whether all heads together are, not each (MiniMax-M2).
      norms_last: whether heads are, after they are rotated (Hunyuan).
      paired: whether neighbouring features of a head are rotated together, not halves (ERNIE 4.5).
      wide_rope: whether cosines and sines are float32 in every model (ERNIE 4.5).
      rotated: per layer, whether it rotates heads.
      windows: per layer, how many tokens a query sees (itself included), or None for all before it.
    """

    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rotated: tuple[bool, ...]
    norms_across: bool
    norms_last: bool
    paired: bool
    wide_rope: bool
    windows: tuple[int | None, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read a `config.json`, in the spelling of transformers 5 or an older one.

        Absent keys take the defaults of transformers' configuration classes for that model type,
        but for sizes and end tokens, whose defaults are those of one model: sizes must be stated.

        Raises:
          ModelError: listing every key that is missing, malformed or asks for the unsupported.
        """
        reader = ConfigReader(config)
        model_type = reader.choose("model_type", None, tuple(RELATIVES), required=True)
        if model_type is None:
            raise ModelError("this model is not supported", reader.reasons)
        family = RELATIVES[model_type]
        stated = read_stated(
            reader,
            rms_norm_eps=family.rms_norm_eps,
            rope_theta=family.rope_theta,
            states_kv_heads=family.states_kv_heads,
            head_dim=family.head_dim,
            partial_rotary_factor=family.partial_rotary_factor,
            tied=family.tied,
            rotary_key=family.rotary_key,
            rope=family.rope,
        )
        for key, value in family.required.items():
            reader.require(key, value)
        layers = stated["num_hidden_layers"]
        rotated = read_rotated(reader, layers) if family.has_unrotated else (True,) * layers
        parsed = cls(
            **stated,
            **(read_multipliers(reader) if family.has_multipliers else {}),
            qkv_bias=_decide(reader, family.qkv_bias),
            out_bias=_decide(reader, family.out_bias),
            mlp_bias=_decide(reader, family.mlp_bias),
            qk_norm=_decide(reader, family.qk_norm),
            rotated=rotated,
            windows=read_windows(reader, family.windows, layers, rotated),
            norms_across=family.norms_across,
            norms_last=family.norms_last,
            paired=family.paired,
            wide_rope=family.wide_rope,
            moe=read_moe(reader, family.experts, layers),
            prediction_layers=reader.count(
                family.prediction_key,
                int(family.has_prediction_layers),
                least=0,
                most=MAX_LAYERS,  # each is a branch of a pattern
            ),
        )
        check_reasons(reader)
        return parsed


def _decide(reader: ConfigReader, rule: Rule) -> bool:
    return rule if isinstance(rule, bool) else reader.flag(*rule)
