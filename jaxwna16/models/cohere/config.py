"""`CohereConfig`: what `config.json` says about a Command R, R7B or A, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.config.language_config import LanguageConfig
from jaxwna16.models.config.stated import check_reasons, read_stated
from jaxwna16.models.config.windows import UNREAD, WindowRule, Windows, read_windows

_BUILT = {
    "use_qk_norm": False,
    "use_parallel_block": True,
    "use_gated_activation": True,
    "rotary_pct": 1.0,
}
"""What Cohere's own keys must say, if they are there. transformers reads only the first of them,
and that in Command R alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How a model type differs from the others.

    Attributes:
      rope_theta: where the key is absent.
      windows: how config.json states sliding windows, see `read_windows`. In a model with such a
        rule, layers that see all tokens have no rope.
    """

    rope_theta: float
    windows: Windows = UNREAD


KINDS = {
    "cohere": Kind(rope_theta=5e5),
    "cohere2": Kind(
        rope_theta=1e4,
        windows=WindowRule(
            size=4096, full_every=4, pattern_key="sliding_window_pattern", is_needed=True
        ),
    ),
}
"""`model_type` -> its row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CohereConfig(LanguageConfig):
    """Everything the definition in `jaxwna16.models.cohere.definition` needs to know; hashable.

    Attributes:
      attention_bias: whether the four linears of attention have a bias.
      windows: per layer, how many tokens a query sees (itself included), or None for all before it.
      rotated: per layer, whether it rotates heads.
    """

    attention_bias: bool
    windows: tuple[int | None, ...]
    rotated: tuple[bool, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CohereConfig:
        """Read a `config.json`; absent keys take the defaults of transformers, but for sizes.

        Raises:
          ModelError: listing every key that is missing, malformed or asks for the unsupported.
        """
        reader, kind = ConfigReader(config), KINDS[config["model_type"]]
        stated = read_stated(
            reader, rms_norm_eps=1e-5, rope_theta=kind.rope_theta, states_kv_heads=False, tied=True
        )
        for key, value in _BUILT.items():
            if reader.config.get(key, value) != value:
                reader.refuse(key, reader.config[key], str(value).lower())
        windows = read_windows(reader, kind.windows, stated["num_hidden_layers"])
        stated["rms_norm_eps"] = reader.number("layer_norm_eps", 1e-5)
        parsed = cls(
            **stated,
            logit_scale=reader.number("logit_scale", 0.0625),
            attention_bias=reader.flag("attention_bias"),
            windows=windows,
            rotated=tuple(kind.windows is UNREAD or window is not None for window in windows),
            moe=None,
        )
        check_reasons(reader)
        return parsed
