"""`Olmo2Config`: what `config.json` says about an OLMo 2, an OLMo 3 or an EXAONE 4, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.config.language_config import LanguageConfig
from jaxwna16.models.config.rope_config import (
    RopeConfig,
    divide_rope,
    read_rope,
    read_rotary_dim,
    replace_rope,
)
from jaxwna16.models.config.stated import check_reasons, read_stated
from jaxwna16.models.config.windows import WindowRule, Windows, read_windows

_THETA = "rope_theta"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How a model type differs from the others.

    Attributes:
      windows: how config.json states sliding windows, see `read_windows`.
      full_rope: the rope of layers that see all tokens, in a model with windows: the "same" as that
        of the others, one of its "own", or "none".
      has_bias: whether `attention_bias` is read.
      states_kv_heads, rope_theta: see `read_stated`.
    """

    windows: Windows = None
    full_rope: Literal["same", "own", "none"] = "same"
    has_bias: bool = True
    states_kv_heads: bool = False
    rope_theta: float = 1e4


KINDS = {
    "olmo2": Kind(),
    "olmo3": Kind(
        windows=WindowRule(size=4096, full_every=4, is_needed=True),
        full_rope="own",
        rope_theta=5e5,
    ),
    "exaone4": Kind(
        windows=WindowRule(size=4096, full_every=4, pattern_key="sliding_window_pattern"),
        full_rope="none",
        has_bias=False,
        states_kv_heads=True,
    ),
}
"""`model_type` -> its row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Olmo2Config(LanguageConfig):
    """Everything the definitions in `jaxwna16.models.olmo2.definition` need to know; hashable.

    Attributes:
      attention_bias: whether the four linears of attention have a bias.
      windows: per layer, how many tokens a query sees (itself included), or None for all before it.
      ropes: one or two, `rope` first.
      rotations: per layer, the number of its rope, or None.
    """

    attention_bias: bool
    windows: tuple[int | None, ...]
    ropes: tuple[RopeConfig, ...]
    rotations: tuple[int | None, ...]

    @property
    def whole_prompts(self) -> bool:
        return any(rope.rope_type == "dynamic" for rope in self.ropes)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Olmo2Config:
        """Read a `config.json`; absent keys take the defaults of transformers, but for sizes.

        Raises:
          ModelError: listing every key that is missing, malformed or asks for the unsupported.
        """
        kind = KINDS[config["model_type"]]
        reader, others = _divide(config) if kind.full_rope == "own" else (ConfigReader(config), ())
        stated = read_stated(
            reader,
            rms_norm_eps=1e-5,
            rope_theta=kind.rope_theta,
            states_kv_heads=kind.states_kv_heads,
        )
        ropes = [stated["rope"]]
        for other in others:
            ropes.append(read_rope(other, stated["max_position_embeddings"], kind.rope_theta))
            read_rotary_dim(other, stated["head_dim"], 1.0)
            reader.reasons += other.reasons
        windows = read_windows(reader, kind.windows, stated["num_hidden_layers"])
        has_windows = reader.given.get("sliding_window", kind.windows) is not None
        full = None if kind.full_rope == "none" and has_windows else 0
        parsed = cls(
            **stated,
            attention_bias=kind.has_bias and reader.flag("attention_bias"),
            windows=windows,
            ropes=tuple(ropes),
            rotations=tuple(full if w is None else len(ropes) - 1 for w in windows),
            moe=None,
        )
        check_reasons(reader)
        return parsed


def _divide(config: Mapping[str, Any]) -> tuple[ConfigReader, tuple[ConfigReader, ...]]:
    """Readers of the configuration of layers that see all tokens, and of the sliding ones.

    In older files `rope_theta` is of both.
    """
    whole = ConfigReader(config)
    full, sliding = divide_rope(whole)
    theta = whole.config.get(_THETA, 5e5)
    has_own = isinstance(sliding, Mapping) and _THETA in sliding
    if not whole.reasons and theta != 5e5 and not has_own:
        # transformers then takes 500000 for the sliding layers, others take this
        expected = f"500000, or rope_parameters with a {_THETA} for sliding_attention"
        whole.refuse(_THETA, theta, expected)
    others: dict[str, Any] = {}
    if whole.reasons:  # what they refuse is not refused once more
        full, sliding, others = {}, {}, {_THETA: None}
    reader = replace_rope(whole, full, **others)
    reader.reasons += whole.reasons
    return reader, (replace_rope(whole, sliding, "sliding_attention: ", **others),)
