"""`ModelConfig`: what `config.json` says about a model of the Llama family, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxwna16.errors import ModelError
from jaxwna16.models.rope import ROPE_TYPES, RopeConfig

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ACTIVATIONS = ("silu", "swish")
_DTYPES = ("float32", "bfloat16", "float16")
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything the one definition in `jaxwna16.models.llama` needs to know; hashable.

    Attributes:
      model_type: one of `MODEL_TYPES` (SmolLM2 calls itself "llama").
      max_position_embeddings: tokens the model was made for; see `max_length`.
      qkv_bias, out_bias, mlp_bias: which linears have a bias.
      qk_norm: whether queries and keys are normalised per head (Qwen3).
      windows: per layer, how many tokens a query sees (itself included), or None for all before it.
      dtype: the dtype the checkpoint says it was saved in, or None.
      eos_token_ids: tokens that end a text, possibly none.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
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

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together; dynamic rope stretches it by its factor."""
        if self.rope.rope_type == "dynamic":
            return int(self.max_position_embeddings * self.rope.factor)
        return self.max_position_embeddings

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json`, in the spelling of transformers 5 or an older one.

        Absent keys take the defaults of transformers' configuration classes for that model type.

        Raises:
          ModelError: listing every key that is missing, malformed or asks for the unsupported.
        """
        reader = _Reader(config)
        model_type = reader.choose("model_type", None, MODEL_TYPES)
        if model_type is None:
            raise ModelError("this model is not supported", reader.reasons)
        reader.choose("hidden_act", "silu", _ACTIVATIONS)
        if not config.get("is_causal", True):
            reader.refuse("is_causal", False, "only causal attention")
        hidden = reader.count("hidden_size")
        heads = reader.count("num_attention_heads")
        layers = reader.count("num_hidden_layers")
        kv_default = heads if model_type == "llama" or "num_key_value_heads" in config else None
        kv_heads = reader.count("num_key_value_heads", kv_default)
        head_dim = reader.count("head_dim", 128 if model_type == "qwen3" else hidden // heads)
        max_positions = reader.count("max_position_embeddings")
        if config.get("head_dim") is None and model_type != "qwen3" and hidden % heads:
            reader.refuse("hidden_size", hidden, f"a multiple of num_attention_heads = {heads}")
        if heads % kv_heads:
            reader.refuse("num_attention_heads", heads, f"a multiple of kv heads = {kv_heads}")
        if head_dim % 2:
            reader.refuse("head_dim", head_dim, "an even number")
        attention_bias = model_type in ("llama", "qwen3") and reader.flag("attention_bias")
        parsed = cls(
            model_type=model_type,
            vocab_size=reader.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=reader.count("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            qkv_bias=attention_bias or model_type == "qwen2",
            out_bias=attention_bias,
            mlp_bias=model_type == "llama" and reader.flag("mlp_bias"),
            qk_norm=model_type == "qwen3",
            windows=_read_windows(reader, model_type, layers),
            rope=_read_rope(reader, max_positions),
            dtype=reader.choose("dtype" if config.get("dtype") else "torch_dtype", None, _DTYPES),
            eos_token_ids=_read_eos(reader),
        )
        if reader.reasons:
            raise ModelError(f"this {model_type} configuration is not supported", reader.reasons)
        return parsed


class _Reader:
    """Typed access to a `config.json` that collects reasons; a null counts as absent."""

    def __init__(self, config: Mapping[str, Any]):
        self.given = config
        self.config = {key: value for key, value in config.items() if value is not None}
        self.reasons: list[str] = []

    def refuse(self, key: str, found: object, expected: str) -> None:
        self.reasons.append(f"{key}: expected {expected}, found {found!r}")

    def count(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        self.refuse(key, value, "an integer of at least 1")
        return 1

    def number(self, key: str, default: float) -> float:
        value = self.config.get(key, default)
        if _is_positive(value):
            return float(value)
        self.refuse(key, value, "a positive number")
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, value, "true or false")
        return value is True

    def choose(self, key: str, default: str | None, choices: tuple[str, ...]) -> str | None:
        value = self.config.get(key, default)
        if value in choices or (value is None and key != "model_type"):
            return value
        self.refuse(key, value, f"one of {', '.join(choices)}")
        return None


def _is_positive(value: object) -> bool:
    """Whether a value read from JSON is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < math.inf


def _read_windows(reader: _Reader, model_type: str, layers: int) -> tuple[int | None, ...]:
    """Sliding windows per layer, by the rules of transformers' Mistral and Qwen2 configurations."""
    config = reader.config
    full = (None,) * layers
    if model_type == "mistral":
        if "layer_types" in config:
            reader.refuse("layer_types", config["layer_types"], "none in a mistral model")
        unlimited = "sliding_window" in reader.given and "sliding_window" not in config
        return full if unlimited else (reader.count("sliding_window", 4096),) * layers
    if model_type == "llama":
        return full
    window = reader.count("sliding_window", 4096) if reader.flag("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    if not isinstance(first, int):
        reader.refuse("max_window_layers", first, "an integer")
        first = 0
    types = config.get("layer_types")
    if types is None and window is None:
        return full
    if types is None:
        types = [_SLIDING if i >= first else _FULL for i in range(layers)]
    known = isinstance(types, list) and all(kind in (_FULL, _SLIDING) for kind in types)
    if not known or len(types) != layers:
        reader.refuse("layer_types", types, f"{layers} entries, each {_FULL} or {_SLIDING}")
        return full
    if _SLIDING in types and window is None:
        reader.refuse("layer_types", types, "no sliding_attention while use_sliding_window is off")
    return tuple(window if kind == _SLIDING else None for kind in types)


def _read_rope(reader: _Reader, max_positions: int) -> RopeConfig:
    """Rope parameters: `rope_parameters`, or `rope_theta` beside `rope_scaling` with `type`."""
    config = reader.config
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    where = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
        reader.refuse(where, given, "one flat set of parameters for all layers")
        return RopeConfig(rope_type="default", theta=1e4, original_max_positions=max_positions)
    values = {key: value for key, value in given.items() if value is not None}
    rope_type = values.get("rope_type", values.get("type", "default"))
    theta = values.get("rope_theta", config.get("rope_theta", 10000.0))
    partial = values.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    original = max_positions
    if rope_type in ("llama3", "yarn"):
        original = values.get("original_max_position_embeddings", original)
        original = config.get("original_max_position_embeddings", original)
    if rope_type not in ROPE_TYPES:
        reader.refuse(f"{where}.rope_type", rope_type, f"one of {', '.join(ROPE_TYPES)}")
        rope_type = "default"
    if partial != 1.0:
        reader.refuse("partial_rotary_factor", partial, "1.0")
    if rope_type == "yarn" and _is_positive(original):
        values.setdefault("factor", max_positions / original)
    needed = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
    numbers = {"rope_theta": theta, "original_max_position_embeddings": original}
    numbers |= {key: values.get(key) for key in needed.get(rope_type, ())}
    optional = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    numbers |= {key: values[key] for key in optional if key in values}
    for key, value in numbers.items():
        if not _is_positive(value):
            reader.refuse(f"{where}.{key}", value, "a positive number")
    return RopeConfig(
        rope_type=rope_type,
        theta=theta,
        original_max_positions=original,
        truncate=values.get("truncate", True),
        **{key: values[key] for key in (*optional, *needed.get(rope_type, ())) if key in values},
    )


def _read_eos(reader: _Reader) -> tuple[int, ...]:
    value = reader.config.get("eos_token_id", [])
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        reader.refuse("eos_token_id", value, "a token or a list of tokens")
    return tuple(ids)
