"""`Olmo2Config`: what `config.json` says about an OLMo 2, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.config.language_config import LanguageConfig
from jaxwna16.models.config.stated import check_reasons, read_stated
from jaxwna16.models.config.windows import read_windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Olmo2Config(LanguageConfig):
    """Everything the definition in `jaxwna16.models.olmo2.definition` needs to know; hashable.

    Attributes:
      attention_bias: whether the four linears of attention have a bias.
    """

    attention_bias: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Olmo2Config:
        """Read a `config.json`; absent keys take the defaults of transformers, but for sizes.

        Raises:
          ModelError: listing every key that is missing, malformed or asks for the unsupported.
        """
        reader = ConfigReader(config)
        stated = read_stated(reader, rms_norm_eps=1e-5, rope_theta=1e4, states_kv_heads=False)
        read_windows(reader, None, stated["num_hidden_layers"])
        parsed = cls(**stated, attention_bias=reader.flag("attention_bias"), moe=None)
        check_reasons(reader)
        return parsed
