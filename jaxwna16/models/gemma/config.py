"""`GemmaConfig`: what `config.json` says about a Gemma, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.config.language_config import GELU_TANH, LanguageConfig
from jaxwna16.models.config.stated import check_reasons, read_stated
from jaxwna16.models.config.windows import WindowRule, read_windows, slide_every_other


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How a `model_type` differs from the others.

    Numbers are what transformers' configuration class has where the key is absent.

    Attributes:
      attention_softcap, final_softcap: of `attn_logit_softcapping` and `final_logit_softcapping`;
        None is no cap.
      windows: which layers see one.
    """

    attention_softcap: float | None
    final_softcap: float | None
    windows: WindowRule


KINDS = {
    "gemma2": Kind(
        attention_softcap=50.0,
        final_softcap=30.0,
        windows=WindowRule(size=4096, slides=slide_every_other),
    ),
}
"""`model_type` -> what is its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(LanguageConfig):
    """Everything the definition in `jaxwna16.models.gemma.definition` needs to know; hashable.

    Attributes:
      attention_bias: whether the four linears of attention have a bias.
      windows: per layer, how many tokens a query sees (itself included), or None for all before it.
    """

    attention_bias: bool
    windows: tuple[int | None, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> GemmaConfig:
        """Read a `config.json`; absent keys take the defaults of transformers, but for sizes.

        Raises:
          ModelError: listing every key that is missing, malformed or asks for the unsupported.
        """
        reader = ConfigReader(config)
        kind = KINDS[reader.config["model_type"]]
        stated = read_stated(
            reader,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            head_dim=256,
            tied=True,
            activations=GELU_TANH,
        )
        if reader.flag("use_bidirectional_attention"):
            reader.refuse("use_bidirectional_attention", True, "only causal attention")
        caps = (
            ("attn_logit_softcapping", kind.attention_softcap),
            ("final_logit_softcapping", kind.final_softcap),
        )
        attention_softcap, final_softcap = (reader.number_or_none(*cap) for cap in caps)
        parsed = cls(
            **stated,
            attention_bias=reader.flag("attention_bias"),
            windows=read_windows(reader, kind.windows, stated["num_hidden_layers"]),
            moe=None,
            embedding_multiplier=stated["hidden_size"] ** 0.5,
            attention_scale=reader.number("query_pre_attn_scalar", 256.0) ** -0.5,
            attention_softcap=attention_softcap,
            final_softcap=final_softcap,
        )
        check_reasons(reader)
        return parsed
