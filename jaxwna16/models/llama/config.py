"""`LlamaConfig`: what `config.json` says about a language model, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxwna16.errors import ModelError
from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.config.language_config import MAX_LAYERS, LanguageConfig
from jaxwna16.models.config.moe_config import read_moe
from jaxwna16.models.config.stated import check_reasons, read_stated
from jaxwna16.models.config.windows import read_windows
from jaxwna16.models.llama.relatives import RELATIVES, Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(LanguageConfig):
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
            rope=family.rope,
        )
        layers = stated["num_hidden_layers"]
        parsed = cls(
            **stated,
            qkv_bias=_decide(reader, family.qkv_bias),
            out_bias=_decide(reader, family.out_bias),
            mlp_bias=_decide(reader, family.mlp_bias),
            qk_norm=_decide(reader, family.qk_norm),
            windows=read_windows(reader, family.windows, layers),
            moe=read_moe(reader, family.experts, layers),
            prediction_layers=reader.count(
                "num_nextn_predict_layers",
                int(family.has_prediction_layers),
                least=0,
                most=MAX_LAYERS,  # each is a branch of a pattern
            ),
        )
        check_reasons(reader)
        return parsed


def _decide(reader: ConfigReader, rule: Rule) -> bool:
    return rule if isinstance(rule, bool) else reader.flag(*rule)
