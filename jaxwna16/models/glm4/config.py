"""`Glm4Config`: what `config.json` says about a GLM-4 (or the text model of a GLM-4V), checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.config.fused import Fused, fuse_gate_and_up
from jaxwna16.models.config.language_config import LanguageConfig
from jaxwna16.models.config.rope_config import PLAIN, RopeRule
from jaxwna16.models.config.stated import check_reasons, read_stated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How a `model_type` differs from the others.

    Attributes:
      head_dim, rms_norm_eps, partial_rotary_factor, rope: see `read_stated`.
      reads_bias: whether `attention_bias` is read; otherwise queries, keys and values have biases.
    """

    head_dim: int | None
    rms_norm_eps: float
    partial_rotary_factor: float
    rope: RopeRule = PLAIN
    reads_bias: bool


KINDS = {
    "glm4": Kind(head_dim=128, rms_norm_eps=1.5625e-7, partial_rotary_factor=0.5, reads_bias=True),
    "glm4v_text": Kind(
        head_dim=None,
        rms_norm_eps=1e-5,
        partial_rotary_factor=1.0,
        rope=RopeRule(unread=("mrope_section",), rotates_parts=True),
        reads_bias=False,
    ),
}
"""`model_type` -> its row."""
PARTS = frozenset({"glm4v_text"})
"""Those that only stand inside of a whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glm4Config(LanguageConfig):
    """Everything the definition in `jaxwna16.models.glm4.definition` needs to know; hashable.

    Attributes:
      qkv_bias: whether queries, keys and values have biases.
    """

    qkv_bias: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Glm4Config:
        """Read a `config.json`; absent keys take the defaults of transformers, but for sizes.

        Raises:
          ModelError: listing every key that is missing, malformed or asks for the unsupported.
        """
        reader = ConfigReader(config)
        kind = KINDS[reader.config["model_type"]]
        stated = read_stated(
            reader,
            rms_norm_eps=kind.rms_norm_eps,
            rope_theta=1e4,
            head_dim=kind.head_dim,
            partial_rotary_factor=kind.partial_rotary_factor,
            rope=kind.rope,
        )
        parsed = cls(
            **stated,
            qkv_bias=reader.flag("attention_bias", True) if kind.reads_bias else True,
            moe=None,
        )
        check_reasons(reader)
        return parsed


def list_fused(config: Glm4Config) -> tuple[Fused, ...]:
    """Gate and up are one module in the files."""
    return (fuse_gate_and_up(config),)
