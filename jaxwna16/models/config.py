"""`ModelConfig`: what `config.json` says about a language model, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxwna16.errors import ModelError
from jaxwna16.models.config_reader import ConfigReader
from jaxwna16.models.moe_config import MOE_TYPES, MoeConfig, read_moe
from jaxwna16.models.rope import RopeConfig
from jaxwna16.models.rope_config import read_rope, read_rotary_dim
from jaxwna16.models.windows import read_windows

ACTIVATIONS = ("silu", "swish")
DTYPES = ("float32", "bfloat16", "float16")
MAX_LAYERS = 1000  # each is made, abstractly, before it is looked for in the files

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
class ModelConfig:
    """Everything the one definition in `jaxwna16.models.llama` needs to know; hashable.

    Attributes:
      model_type: one of `MODEL_TYPES` (SmolLM2 calls itself "llama").
      max_position_embeddings: tokens the model was made for; see `max_length`.
      rotary_dim: features of a head that are rotated, from the first on; head_dim but for GLM.
      qkv_bias, out_bias, mlp_bias: which linears have a bias.
      qk_norm: whether queries and keys are normalised per head (Qwen3).
      windows: per layer, how many tokens a query sees (itself included), or None for all before it.
      dtype: the dtype the checkpoint says it was saved in, or None.
      eos_token_ids: tokens that end a text, possibly none.
      moe: experts and routing; None in a model without.
      prediction_layers: how many layers may stand past the last in the files, for predicting
        several tokens at once.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rope: RopeConfig
    dtype: str | None
    eos_token_ids: tuple[int, ...]
    moe: MoeConfig | None
    prediction_layers: int

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together; dynamic rope stretches it by its factor."""
        if self.rope.rope_type == "dynamic":
            return int(self.max_position_embeddings * self.rope.factor)
        return self.max_position_embeddings

    @property
    def whole_prompts(self) -> bool:
        """Whether prompts must be run in one piece: dynamic rope turns all of it by its length."""
        return self.rope.rope_type == "dynamic"

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json`, in the spelling of transformers 5 or an older one.

        Absent keys take the defaults of transformers' configuration classes for that model type.

        Raises:
          ModelError: listing every key that is missing, malformed or asks for the unsupported.
        """
        reader = ConfigReader(config)
        model_type = reader.choose("model_type", None, MODEL_TYPES)
        if model_type is None:
            raise ModelError("this model is not supported", reader.reasons)
        family = _FAMILIES[model_type]
        reader.choose("hidden_act", "silu", ACTIVATIONS)
        if not config.get("is_causal", True):
            reader.refuse("is_causal", False, "only causal attention")
        hidden = reader.count("hidden_size")
        heads = reader.count("num_attention_heads")
        layers = reader.count("num_hidden_layers", most=MAX_LAYERS)
        kv_default = heads if model_type == "llama" or "num_key_value_heads" in config else None
        kv_heads = reader.count("num_key_value_heads", kv_default)
        head_dim = reader.count("head_dim", family.head_dim or hidden // heads)
        max_positions = reader.count("max_position_embeddings")
        if config.get("head_dim") is None and family.head_dim is None and hidden % heads:
            reader.refuse("hidden_size", hidden, f"a multiple of num_attention_heads = {heads}")
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
            dtype=reader.choose("dtype" if config.get("dtype") else "torch_dtype", None, DTYPES),
            eos_token_ids=read_eos(reader),
            moe=read_moe(reader, model_type, layers) if model_type in MOE_TYPES else None,
            prediction_layers=reader.count(
                "num_nextn_predict_layers", int(family.has_prediction_layers), least=0
            ),
        )
        if reader.reasons:
            raise ModelError(f"this {model_type} configuration is not supported", reader.reasons)
        return parsed


def _decide(reader: ConfigReader, rule: Rule) -> bool:
    return rule if isinstance(rule, bool) else reader.flag(*rule)


def read_eos(reader: ConfigReader) -> tuple[int, ...]:
    """`eos_token_id`, one token or several."""
    value = reader.config.get("eos_token_id", [])
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        reader.refuse("eos_token_id", value, "a token or a list of tokens")
    return tuple(ids)
