"""`GemmaConfig`: what `config.json` says about a Gemma, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.config.language_config import GELU_TANH, LanguageConfig
from jaxwna16.models.config.rope_config import (
    RopeConfig,
    divide_rope,
    read_rope,
    read_rotary_dim,
    replace_rope,
)
from jaxwna16.models.config.stated import check_reasons, read_stated
from jaxwna16.models.config.windows import WindowRule, read_windows

_ATTENTION_CAP = "attn_logit_softcapping"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How a `model_type` differs from the others.

    Numbers are what transformers' configuration class has where the key is absent.

    Attributes:
      attention_softcap: of `attn_logit_softcapping`; None is a family without.
      final_softcap: of `final_logit_softcapping`; None is no cap.
      windows: how config.json states sliding windows, see `read_windows`.
      qk_norm: whether queries and keys are normalised per head.
      rope_theta: of layers that see all tokens.
      local_theta: of layers with a window, of `rope_local_base_freq`; None is one rope for both.
    """

    attention_softcap: float | None = None
    final_softcap: float | None = None
    windows: WindowRule
    qk_norm: bool = False
    rope_theta: float = 1e4
    local_theta: float | None = None


KINDS = {
    "gemma2": Kind(
        attention_softcap=50.0,
        final_softcap=30.0,
        windows=WindowRule(size=4096, full_every=2, is_needed=True),
    ),
    "gemma3_text": Kind(
        windows=WindowRule(
            size=4096, full_every=6, pattern_key="sliding_window_pattern", is_needed=True
        ),
        qk_norm=True,
        rope_theta=1e6,
        local_theta=1e4,
    ),
}
"""`model_type` -> what is its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(LanguageConfig):
    """Everything the definition in `jaxwna16.models.gemma.definition` needs to know; hashable.

    Attributes:
      attention_bias: whether the four linears of attention have a bias.
      qk_norm: whether queries and keys are normalised per head.
      windows: per layer, how many tokens a query sees (itself included), or None for all before it.
      local_rope: of layers with a window, where it is not `rope`.
    """

    attention_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    local_rope: RopeConfig | None

    @property
    def max_length(self) -> int:
        """As many tokens as config.json says, where it says what scaled rope reaches."""
        return super().max_length if self.local_rope is None else self.max_position_embeddings

    @property
    def whole_prompts(self) -> bool:
        local = self.local_rope is not None and self.local_rope.rope_type == "dynamic"
        return local or super().whole_prompts

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> GemmaConfig:
        """Read a `config.json`; absent keys take the defaults of transformers, but for sizes.

        Raises:
          ModelError: listing every key that is missing, malformed or asks for the unsupported.
        """
        kind = KINDS[config["model_type"]]
        reader, local = _divide(config, kind)
        stated = read_stated(
            reader,
            rms_norm_eps=1e-6,
            rope_theta=kind.rope_theta,
            head_dim=256,
            tied=True,
            activations=GELU_TANH,
        )
        local_rope = None
        if local is not None and kind.local_theta is not None:
            read_rotary_dim(local, stated["head_dim"], 1.0)
            local_rope = read_rope(local, stated["max_position_embeddings"], kind.local_theta)
            reader.reasons += local.reasons
        if reader.flag("use_bidirectional_attention"):
            reader.refuse("use_bidirectional_attention", True, "only causal attention")
        if kind.attention_softcap is None and _ATTENTION_CAP in reader.config:
            reader.refuse(_ATTENTION_CAP, reader.config[_ATTENTION_CAP], "none in this family")
        parsed = cls(
            **stated,
            attention_bias=reader.flag("attention_bias"),
            qk_norm=kind.qk_norm,
            windows=read_windows(reader, kind.windows, stated["num_hidden_layers"]),
            local_rope=local_rope,
            moe=None,
            embedding_multiplier=stated["hidden_size"] ** 0.5,
            attention_scale=reader.number("query_pre_attn_scalar", 256.0) ** -0.5,
            attention_softcap=reader.number_or_none(_ATTENTION_CAP, kind.attention_softcap),
            final_softcap=reader.number_or_none("final_logit_softcapping", kind.final_softcap),
        )
        check_reasons(reader)
        return parsed


def _divide(config: Mapping[str, Any], kind: Kind) -> tuple[ConfigReader, ConfigReader | None]:
    """Readers of the configuration, with the rope of layers that see all tokens, and of the other.

    In older files `rope_theta` is of layers that see all tokens, and `rope_local_base_freq` is the
    theta of the others.
    """
    whole = ConfigReader(config)
    if kind.local_theta is None:
        return whole, None
    full, sliding = divide_rope(whole)
    reader = replace_rope(whole, full)
    reader.reasons += whole.reasons
    theta = whole.config.get("rope_local_base_freq")
    return reader, replace_rope(whole, sliding, "sliding_attention: ", rope_theta=theta)
